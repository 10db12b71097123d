"""`tagstore pairs`: an answer is preferred to the same answer with a tag put in that is not true."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tagstore.cli import cli
from tagstore.client import connect
from tagstore.errors import AlreadyExists, InvalidInput
from tagstore.mining import load_miner, load_rules
from tagstore.preferences import write_pairs
from tagstore.preferences.swaps import Candidate, swap
from tagstore.preferences.vocabulary import Spoken, attribute_fits, name_fits, object_fits
from tagstore.readers.samples import read_samples
from tagstore.types import Pair

CAPTIONS = (
    "A lion sleeps on a carpet.", "A monkey eats a banana.", "A tiger and a giraffe in a cage.",
    "A red umbrella and a kite.", "A blue umbrella beside a piano.", "Two lamps and a violin.",
    "A camel in the desert.",
)  # fmt: skip
"""One of each picture of the store."""
RULES = load_rules()


def scene(number: int) -> bytes:
    """A PNG of blurred colours, different for each number."""
    colours = np.random.default_rng(number).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, mini) -> Path:
    """A root with the store "zoo": seven pictures, so that all are neighbours of any picture."""
    from tagstore.ingestion import ingest

    folder = tmp_path_factory.mktemp("zoo")
    (folder / "source").mkdir()
    for number, caption in enumerate(CAPTIONS):
        (folder / "source" / f"{number}.png").write_bytes(scene(number))
        (folder / "source" / f"{number}.txt").write_text(caption)
    ingest(str(folder / "source"), root=folder / "root", store="zoo", encoder=mini)
    return folder / "root"


@pytest.fixture(scope="module")
def miner():
    return load_miner("rules")


def conversation(*turns: str) -> list[dict[str, str]]:
    """Turns of human and gpt, in turn."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


def write_samples(folder: Path, *records: dict) -> Path:
    """Samples of pictures that the store does not hold, but for those that name their own."""
    folder.mkdir(exist_ok=True)
    for number, record in enumerate(records):
        if "image" not in record and "images" not in record:
            record["image"] = f"new-{number}.png"
            (folder / record["image"]).write_bytes(scene(100 + number))
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def pairs_of(zoo: Path, data: Path, out: Path, miner, **options) -> tuple[list[dict], dict[str, int]]:
    """The rows that are written for samples, and the reasons of those without one."""
    import pyarrow.parquet as pq

    with connect(f"file://{zoo}/zoo?k=7") as source:
        report = write_pairs(source, read_samples(data), out, miner=miner, rules=RULES, **options)
    rows = pq.read_table(out).to_pylist()
    assert report.pairs == len(rows) == sum(report.kinds.values())
    assert report.samples == report.pairs + sum(report.without.values())
    return rows, dict(report.without)


def text_of(messages: list[dict]) -> str:
    (message,) = messages
    assert message["role"] == "assistant"
    return "".join(part["text"] for part in message["content"])


def test_the_command_writes_what_trl_reads(zoo: Path, tmp_path: Path):
    import datasets

    question = "What is <image> on this picture?"
    data = write_samples(
        tmp_path / "data",
        {
            "id": "a",
            "conversations": conversation("<image>\nWhat do you see?", "An elephant. The elephant is grey."),
        },
        {
            "id": "b",
            "conversations": conversation(question, "Yes.", "And more?", "Three elephants beside a harp."),
        },
        {"id": "c", "conversations": conversation("<image>\nIs it day?", "Yes.")},
        {"id": "d", "caption": "An elephant under a red umbrella."},
    )
    out = tmp_path / "pairs" / "train.parquet"
    out.parent.mkdir()
    url = f"file://{zoo}/zoo?k=7"
    outcome = CliRunner().invoke(cli, ["pairs", url, "--data", str(data), "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    assert f"{out}: 3 pairs of 4 samples with zoo@1" in outcome.output
    assert "1 samples give no pair: no tag in any answer" in outcome.output

    loaded = datasets.load_dataset(str(out.parent), cache_dir=str(tmp_path / "cache"))["train"]
    assert isinstance(loaded.features["images"].feature, datasets.Image)
    rows = {row["key"]: row for row in loaded}
    assert [image.size for image in rows["a"]["images"]] == [(96, 96)]
    picture = {"type": "image", "text": None}
    assert rows["a"]["prompt"] == [
        {"role": "user", "content": [picture, {"type": "text", "text": "What do you see?"}]}
    ]
    # the picture stands where the sample has it, and the turns before the answer are the prompt
    assert [message["role"] for message in rows["b"]["prompt"]] == ["user", "assistant", "user"]
    assert rows["b"]["prompt"][0]["content"] == [
        {"type": "text", "text": "What is "}, picture, {"type": "text", "text": " on this picture?"}
    ]  # fmt: skip
    assert rows["d"]["prompt"][0]["content"][1]["text"] == "Describe the image."
    for row in rows.values():
        chosen, rejected = text_of(row["chosen"]), text_of(row["rejected"])
        assert chosen != rejected
        assert row["absent"].split()[0] in rejected.lower()
    assert "lephant" not in text_of(rows["a"]["rejected"])  # in all places that it is named


def test_the_same_seed_gives_the_same_file(zoo: Path, tmp_path: Path, miner):
    answers = ("An elephant beside a harp.", "Elephants.", "An elephant and a bear.")
    data = write_samples(
        tmp_path / "data",
        *({"id": str(n), "conversations": conversation("What?", answers[n % 3])} for n in range(12)),
    )
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.parquet"
        pairs_of(zoo, data, out, miner, seed=seed)
        digests.append(hashlib.sha256(out.read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(AlreadyExists, match=r"0\.parquet is there"):
        pairs_of(zoo, data, tmp_path / "0.parquet", miner)


def test_a_server_gives_the_same_pairs(zoo: Path, tmp_path: Path, miner):
    from tagstore.serving.server import Server

    data = write_samples(
        tmp_path / "data",
        *(
            {"id": str(n), "conversations": conversation("What?", "An elephant and a harp.")}
            for n in range(3)
        ),
    )
    pairs_of(zoo, data, tmp_path / "local.parquet", miner)
    server = Server(zoo, "127.0.0.1:0", device="cpu")
    server.start()
    try:
        with connect(f"grpc://{server.address}/zoo?k=7") as source:
            write_pairs(source, read_samples(data), tmp_path / "served.parquet", miner=miner, rules=RULES)
    finally:
        server.stop(0)
    assert (tmp_path / "local.parquet").read_bytes() == (tmp_path / "served.parquet").read_bytes()


TOLD = {
    "in the answer": {"conversations": conversation("What?", "An elephant, a lion, a monkey.")},
    "in another turn": {
        "conversations": conversation("What?", "An elephant.", "More?", "Yes, a lion and monkeys.")
    },
    "in the question": {"conversations": conversation("Is there a lion or a monkey?", "An elephant.")},
    "in another caption": {"captions": ["An elephant.", "A lion looks at it.", "The monkey is small."]},
    "by annotators": {"captions": ["An elephant."], "objects": ["lion", "monkey"]},
}  # fmt: skip


@pytest.mark.parametrize("told", TOLD)
def test_what_the_sample_speaks_of_is_never_put_in(told: str, zoo: Path, tmp_path: Path, miner):
    record = TOLD[told]
    data = write_samples(
        tmp_path / "data", *({"id": str(n)} | json.loads(json.dumps(record)) for n in range(16))
    )
    rows, _ = pairs_of(zoo, data, tmp_path / "pairs.parquet", miner)
    absent = {row["absent"] for row in rows}
    assert absent  # elephant for tiger, giraffe, camel
    assert absent <= {"tiger", "giraffe", "camel", "cage"}


def test_what_the_store_says_of_the_picture_itself_is_never_put_in(zoo: Path, tmp_path: Path, miner):
    """The picture of the store with the tiger and the giraffe, of which the sample names the giraffe only."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("2.png", "another-name.png"):  # the same by its key, and by its hashes
        (folder / name).write_bytes(scene(2))
        records = [
            {"id": name.removesuffix(".png") if name == "2.png" else f"{name}{n}", "image": name}
            | {"conversations": conversation("What?", "A giraffe.")}
            for n in range(1 if name == "2.png" else 16)
        ]
        rows, _ = pairs_of(zoo, write_samples(folder, *records), tmp_path / f"{name}.parquet", miner)
        assert {row["absent"] for row in rows} <= {"lion", "monkey", "camel"}
        assert rows


def test_samples_without_a_pair_are_counted_by_reason(zoo: Path, tmp_path: Path, miner):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"\x89PNG no picture")
    (folder / "gone.png").write_bytes(scene(9))
    turns = conversation("What?", "An elephant.")
    data = write_samples(
        folder,
        {"id": "text", "images": [], "conversations": turns},
        {"id": "two", "images": ["gone.png", "gone.png"], "conversations": turns},
        {"id": "broken", "image": "broken.png", "conversations": turns},
        {"id": "gone", "image": "gone.png", "conversations": turns},
        {"id": "no tag", "conversations": conversation("Is it?", "No.")},
        {"id": "nothing fits", "conversations": conversation("Who?", "A person.")},
        {"id": "good", "conversations": turns},
    )
    samples = read_samples(data)
    (folder / "gone.png").unlink()
    with connect(f"file://{zoo}/zoo?k=7") as source:
        report = write_pairs(source, samples, tmp_path / "pairs.parquet", miner=miner, rules=RULES)
    assert report.without == {"pictures": 2, "image": 2, "tags": 1, "fit": 1}
    assert (report.samples, report.pairs, report.kinds) == (7, 1, {"object": 1})
    with (
        connect(f"file://{zoo}/zoo?k=7&on_failure=empty") as source,
        pytest.raises(InvalidInput, match="on_failure"),
    ):
        write_pairs(source, samples, tmp_path / "no.parquet", miner=miner, rules=RULES)


def exchanged(miner, answer: str, *tags: tuple[str, str], likely: tuple[str, ...] = ()) -> set[str]:
    """All texts that an answer becomes, over 20 seeds, with these tags (text, kind) of neighbours."""
    (mentions,) = miner.mine([Pair("a", b"", (answer,))])
    spoken = Spoken.of({RULES.preferred(tag.kind, tag.canonical) for tag in mentions})
    retrieved = [Candidate(text, kind, text, 0.5, text not in likely) for text, kind in tags]
    found = [swap(answer, mentions, retrieved, spoken, RULES, seed=str(seed)) for seed in range(20)]
    return {outcome.text for outcome in found if outcome is not None}


def test_tags_are_written_as_the_sentence_asks_for(miner):
    assert exchanged(miner, "A lion and an elephant.", ("ostrich", "object")) <= {
        "An ostrich and an elephant.", "A lion and an ostrich.",
    }  # fmt: skip
    assert exchanged(miner, "Lions sleep. The lions are old.", ("giraffe", "object")) == {
        "Giraffes sleep. The giraffes are old."
    }
    assert exchanged(miner, "Two women in a tent.", ("man", "object")) == {"Two men in a tent."}
    assert exchanged(miner, "A kite.", ("umbrella", "object")) == {"An umbrella."}
    assert exchanged(miner, "An umbrella.", ("unicycle", "object")) == {"A unicycle."}
    assert exchanged(miner, "A red car.", ("blue car", "attribute")) == {"A blue car."}
    assert exchanged(miner, "Three dogs run.", ("two dog", "attribute")) == {"Two dogs run."}
    assert exchanged(miner, "A view of Paris.", ("London", "entity")) == {"A view of London."}


def test_what_most_neighbours_carry_or_fits_better_is_not_put_in(miner):
    assert exchanged(miner, "A kite.", ("violin", "object"), likely=("violin",)) == set()
    (mentions,) = miner.mine([Pair("a", b"", ("A kite.",))])
    for relevance, count in ((0.6, 0), (0.4, 1)):
        retrieved = [
            Candidate("kite", "object", "kite", 0.5, True),
            Candidate("violin", "object", "violin", relevance, True),
        ]
        outcome = swap("A kite.", mentions, retrieved, Spoken.of(["kite"]), RULES, seed="0")
        assert (outcome is not None) == count


def test_a_thing_is_exchanged_for_one_that_excludes_it():
    spoken = Spoken.of(["dog", "ball", "man", "red car"])
    assert object_fits("dog", "cat", spoken)
    assert not object_fits("dog", "puppy", spoken)  # may be the same one
    assert not object_fits("dog", "animal", spoken)
    assert not object_fits("dog", "kite", spoken)  # an animal for an animal
    assert not object_fits("ball", "soccer ball", spoken)
    assert not object_fits("ball", "car", spoken)  # it is spoken of: a red car
    assert not object_fits("ball", "tree", spoken)  # many pictures have one, and do not say so
    assert object_fits("man", "woman", spoken)
    assert not object_fits("man", "skier", spoken)  # who may be a man
    assert not object_fits("man", "woman", Spoken.of(["man", "child"]))  # of whom nothing is known
    assert attribute_fits("red car", "blue car", spoken)
    assert not attribute_fits("red car", "orange car", spoken)  # some call it so
    assert not attribute_fits("red car", "old car", spoken)  # a red car may be old
    assert not attribute_fits("red car", "blue dog", spoken)
    assert not attribute_fits("red car", "blue car", Spoken.of(["red car", "blue car"]))
    assert attribute_fits("two dog", "three dog", spoken)
    assert name_fits("pink lady", spoken)
    assert not name_fits("Red Dog".lower(), spoken)


@pytest.fixture
def small_vlm(tmp_path: Path) -> Path:
    """A random Llava with the tokenizer of SmolLM2, as `from_pretrained` loads it."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from tuna_model.presets import smollm

    tokenizer = smollm.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=16,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer,
        patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
            "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    return tmp_path / "vlm"


@pytest.mark.matrix
def test_trl_trains_on_the_file(zoo: Path, small_vlm: Path, tmp_path: Path, miner, foreign_environment):
    """TRL's own script, which `trl dpo` runs; TRL_SCRIPT names another, such as its example dpo_vlm.py."""
    pytest.importorskip("trl", reason="pip install trl")
    folder = tmp_path / "pairs"
    folder.mkdir()
    data = write_samples(
        tmp_path / "data",
        *({"id": str(n), "conversations": conversation("<image>\nWhat?", "An elephant.")} for n in range(8)),
    )
    pairs_of(zoo, data, folder / "train.parquet", miner)
    script = [os.environ["TRL_SCRIPT"]] if "TRL_SCRIPT" in os.environ else ["-m", "trl.scripts.dpo"]
    process = subprocess.run(
        [
            sys.executable, *script, "--dataset_name", str(folder), "--model_name_or_path", str(small_vlm),
            "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--per_device_train_batch_size", "2",
            "--use_cpu", "--logging_steps", "1", "--report_to", "none", "--max_length", "256",
            "--bf16", "False",
            "--gradient_checkpointing", "False",
        ],
        env=foreign_environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert len(losses) == 2
    assert all(np.isfinite(losses))
