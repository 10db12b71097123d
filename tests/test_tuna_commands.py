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


def tuna(options: str, *arguments: str | Path) -> str:
    """Run `tuna` with the words of `options` and with arguments; return its standard output."""
    words = [*options.split(), *map(str, arguments)]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory, shapes_root: Path) -> Path:
    """A run of `tuna train`."""
    folder = tmp_path_factory.mktemp("commands")
    data = write_llava(folder / "data")
    settings = "--set steps=3 --set batch_size=4 --set tensorboard=true"
    paths = ("--data", data, "--out", folder / "run", "--export", folder / "model")
    tuna(f"train --config tiny-overfit --store file://{shapes_root}/shapes {settings}", *paths)
    return folder


def test_a_run_is_a_model_and_so_is_its_export(run: Path, shapes_root: Path):
    (run / "q.png").write_bytes(picture("red", "circle"))
    options = f"generate --store file://{shapes_root}/shapes --max-tokens 5 --json --model"
    of_run, of_export = (
        json.loads(tuna(options, run / name, run / "q.png", "What is it?")) for name in ("run", "model")
    )
    assert of_run["answer"] == of_export["answer"]
    assert of_run["tags"] == of_export["tags"]
    assert list((run / "run" / "tensorboard").iterdir())


def test_eval_and_audit_write_their_figures(run: Path, shapes_root: Path):
    shard = write_shard(run / "test.tar", 6)
    options = f"captions --store file://{shapes_root}/shapes --limit 3 --resamples 10"
    paths = ("--model", run / "run", "--data", shard, "--out", run / "out")
    report = json.loads(tuna(f"eval {options} --json", *paths))
    assert {metric["name"] for metric in report["metrics"]} == {"BLEU-4", "ROUGE-L", "CIDEr"}
    assert "## captions: CIDEr by tags" in tuna(f"audit {options}", *paths)
    figures = {f"captions.{suffix}" for suffix in ("answers.jsonl", "json", "md")}
    figures |= {f"audit-captions.{suffix}" for suffix in ("json", "md", "svg")}
    assert {path.name for path in (run / "out").iterdir()} == figures


def test_explain_writes_a_page(run: Path, shapes_root: Path):
    (run / "p.png").write_bytes(picture("blue", "square"))
    out = run / "why.html"
    options = f"explain --model tiny --store file://{shapes_root}/shapes --max-tokens 3 --out"
    assert tuna(options, out, run / "p.png", "What is it?").strip() == str(out)
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


def test_a_mistake_is_one_line_on_stderr(tmp_path: Path, capsys):
    paths = ["--data", str(tmp_path / "none.json"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="1"):
        main(["train", "--config", "tiny-overfit", *paths])
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
