"""Does the whole training path learn? A small random decoder learns the captions of 200 photographs by heart.

    python -m benchmarks.model.overfit --data FLICKR8K

FLICKR8K is a folder of WebDataset shards (train-*.tar). The run fails unless the mean loss of the last ten
steps is below 0.1. `--quick` takes 20 photographs.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import arguments_parser, table, write
from tuna_model.training.recipe import Recipe
from tuna_model.training.train import train

LIMIT = 0.1


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.tar")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--width", type=int, default=128, help="of the decoder")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    photographs, steps = (20, 200) if options.quick else (200, options.steps)
    decoder = {
        "model_type": "llama", "vocab_size": 260, "hidden_size": options.width,
        "intermediate_size": 2 * options.width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        values = Recipe.read("tiny-overfit").to_dict() | {
            "out": f"{scratch}/run",
            "steps": steps,
            "save_every": steps,
            "rates": dict.fromkeys(("connector", "tag_encoder", "language_model"), options.rate),
            "model_config": {"connector": "pooled", "pool_side": 1, "text_config": decoder},
            "data": {
                "path": str(options.data / "train-000.tar"), "limit": photographs,
                "features": f"{scratch}/features", "template": "plain", "first_caption": True,
            },
        }  # fmt: skip
        start, cpu = time.perf_counter(), time.process_time()
        train(Recipe.of(values))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        losses = [
            json.loads(line)["loss"] for line in Path(scratch, "run", "log.jsonl").read_text().splitlines()
        ]
    loss = sum(losses[-10:]) / 10
    peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB"
    rows = [(photographs, steps, f"{loss:.3f}", f"{seconds:.0f} s", f"{cpu:.0f} s", peak)]
    text = table(("photographs", "steps", "loss", "seconds, embedding included", "CPU", "peak memory"), rows)
    if options.quick:
        print(text)
    else:
        write(
            "overfit",
            "A small decoder learns 200 captions by heart",
            text,
            packages=("torch", "transformers", "accelerate"),
        )
    if loss >= LIMIT:
        sys.exit(f"the loss is {loss:.3f} after {steps} steps: it should be below {LIMIT}")


if __name__ == "__main__":
    main()
