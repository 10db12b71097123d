"""A process that trains, for tests that kill it or start two.

    python training.py RECIPE.json [ddp] [fsdp2] [STEP]

After step number STEP it kills itself with SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def main() -> None:
    from accelerate.state import AcceleratorState
    from torch.distributed.tensor import DTensor

    from tuna_model.training import checkpoint
    from tuna_model.training.recipe import Recipe
    from tuna_model.training.train import train

    values = json.loads(Path(sys.argv[1]).read_text())
    sharded: list[bool] = []
    gather = checkpoint.trained_tensors

    def watched(model, values=None):
        sharded.append(
            all(isinstance(parameter, DTensor) for _, parameter in checkpoint.trained_parameters(model))
        )
        return gather(model, values)

    checkpoint.trained_tensors = watched
    last = next((int(word) for word in sys.argv[2:] if word.isdigit()), 0)

    def after_step(line) -> None:
        if line.step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    for mode in [word for word in sys.argv[2:] if not word.isdigit()] or ["plain"]:
        os.environ.update(
            {**FSDP2, "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"} if mode == "fsdp2" else {}
        )
        recipe = Recipe.of({**values, "out": f"{values['out']}-{mode}"} if mode != "plain" else values)
        train(recipe, progress=after_step)
        assert sharded[-1] is (mode == "fsdp2"), "parameters are cut into shards with FSDP2 and whole without"
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main()
