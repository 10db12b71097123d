"""tuna train, eval, audit, explain and serve from the command line, on real files and processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from click.testing import CliRunner

from captioned import write_llava, write_shard
from pictures import picture
from tuna_model.cli import cli, main
from tuna_model.training.recipe import CONFIGS


def tuna(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> Path:
    """A run of `tuna train`."""
    folder = tmp_path_factory.mktemp("commands")
    data = write_llava(folder / "data")
    tuna(
        "train", "--config", "tiny-overfit", "--data", str(data), "--store", f"file://{shapes_root}/shapes", "--out", str(folder / "run"),
        "--set", "steps=3", "--set", "batch_size=4", "--set", "tensorboard=true", "--export", str(folder / "model"),
    )  # fmt: skip
    return folder


def test_a_run_is_a_model_and_so_is_its_export(run: Path, shapes_root: Path):
    (run / "q.png").write_bytes(picture("red", "circle"))
    store = ("--store", f"file://{shapes_root}/shapes", "--max-tokens", "5")
    of_run = json.loads(
        tuna("generate", "--model", str(run / "run"), *store, "--json", str(run / "q.png"), "What is it?")
    )
    of_export = json.loads(
        tuna("generate", "--model", str(run / "model"), *store, "--json", str(run / "q.png"), "What is it?")
    )
    assert of_run["answer"] == of_export["answer"]
    assert of_run["tags"] == of_export["tags"]
    assert list((run / "run" / "tensorboard").iterdir())


def test_eval_and_audit_write_their_figures(run: Path, shapes_root: Path):
    shard = write_shard(run / "test.tar", 6)
    common = (
        "--model",
        str(run / "run"),
        "--store",
        f"file://{shapes_root}/shapes",
        "--limit",
        "3",
        "--resamples",
        "10",
        "--out",
        str(run / "out"),
    )
    found = json.loads(tuna("eval", "captions", "--data", str(shard), *common, "--json"))
    assert {one["name"] for one in found["metrics"]} == {"BLEU-4", "ROUGE-L", "CIDEr"}
    assert "## captions: CIDEr by tags" in tuna("audit", "captions", "--data", str(shard), *common)
    assert {path.name for path in (run / "out").iterdir()} == {
        "captions.answers.jsonl", "captions.json", "captions.md", "audit-captions.json", "audit-captions.md", "audit-captions.svg",
    }  # fmt: skip


def test_explain_writes_a_page(run: Path, shapes_root: Path):
    (run / "p.png").write_bytes(picture("blue", "square"))
    out = run / "why.html"
    arguments = (
        "--model",
        "tiny",
        "--store",
        f"file://{shapes_root}/shapes",
        "--max-tokens",
        "3",
        "--out",
        str(out),
    )
    assert tuna("explain", *arguments, str(run / "p.png"), "What is it?").strip() == str(out)
    assert out.read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_serve_says_where_it_listens():
    command = [sys.executable, "-m", "tuna_model.cli", "serve", "--model", "tiny", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert httpx.get(f"{address}/models", trust_env=False).json()["data"][0]["id"] == "tiny"
        finally:
            process.terminate()


def test_a_mistake_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="1"):
        main(
            [
                "train",
                "--config",
                "tiny-overfit",
                "--data",
                str(tmp_path / "none.json"),
                "--out",
                str(tmp_path / "run"),
            ]
        )
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: there is no data set at")


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerates_configurations_have_keys_that_accelerate_knows(path: Path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    known = vars(launch_command_parser().parse_args(["x.py"]))
    values = yaml.safe_load(path.read_text())
    for key in (*values.get("fsdp_config", {}), *values.get("deepspeed_config", {})):
        assert key in known or key.startswith("zero3") or f"deepspeed_{key}" in known
