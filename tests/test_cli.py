"""The commands as a person types them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pictures import picture, write_shapes
from tagstore.cli import COMMANDS, cli
from tagstore.errors import TagstoreError

README = Path(__file__).parent.parent / "README.md"
SENTENCE = "A narrow street with colorful facades under the blue sky in Montepulciano, Italy"


def run(*arguments: str, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(cli, arguments, input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_ingest_prints_what_it_did(tmp_path: Path):
    source = write_shapes(tmp_path / "shapes")
    (source / "bad.png").write_bytes(b"no image")
    (source / "bad.txt").write_text("A caption.")
    result = run(
        "ingest", str(source), "--root", str(tmp_path / "root"), "--store", "s", "--device", "cpu", "--json"
    )
    report = json.loads(result.stdout)
    assert (report["pairs"], report["entries"], report["version"]) == (19, 18, 1)
    assert {"tags", "unique_tags", "seconds", "quarantined"} <= set(report)
    assert report["quarantined"][0]["key"] == "bad"
    assert "not an image" in report["quarantined"][0]["reason"]
    again = run("ingest", str(source), "--root", str(tmp_path / "root"), "--store", "s", "--device", "cpu")
    assert "18 unchanged, 1 quarantined" in again.stdout
    assert "bad" in again.stdout


def test_query_prints_one_object_an_image(server_address: str, shapes_root: Path, tmp_path: Path):
    paths = []
    for colour in ("red", "blue"):
        paths.append(str(tmp_path / f"{colour}.png"))
        Path(paths[-1]).write_bytes(picture(colour, "circle"))
    remote = run("query", f"grpc://{server_address}/shapes", *paths, "--k", "2", "--json").stdout
    local = run("query", f"file://{shapes_root}/shapes", *paths, "--k", "2", "--json").stdout
    assert remote == local
    first, second = (json.loads(line) for line in remote.splitlines())
    assert (first["image"], second["image"]) == tuple(paths)
    assert set(first) == {"image", "store", "version", "neighbours", "tags"}
    assert set(first["neighbours"][0]) == {"key", "entry_id", "similarity"}
    assert set(first["tags"][0]) == {"tag", "kind", "similarity", "votes", "relevance", "neighbours"}
    assert first["neighbours"][0]["key"] == "red-circle"
    table = run("query", f"grpc://{server_address}/shapes", paths[0]).stdout
    assert "red-circle" in table
    assert "red circle" in table


def test_a_bad_image_among_good_ones_is_named_and_the_others_answered(server_address: str, tmp_path: Path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(picture("red", "circle"))
    bad.write_bytes(b"")
    result = run("query", f"grpc://{server_address}/shapes", str(bad), str(good), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["image"] == str(good)
    assert str(bad) in result.stderr


@pytest.mark.parametrize("k", ["0", "1001", "x"])
def test_k_out_of_range_is_a_usage_error(server_address: str, k: str):
    result = run("query", f"grpc://{server_address}/shapes", "image", "--k", k)
    assert result.exit_code == 2
    assert "--k" in result.stderr


def test_mine_prints_one_line_a_caption_in_order(tmp_path: Path):
    result = run("mine", "-", "--json", stdin=f"{SENTENCE}\n\nTwo dogs on a beach\n")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["caption"] for line in lines] == [SENTENCE, "", "Two dogs on a beach"]
    texts = {t["text"] for t in lines[0]["tags"]}
    assert {"narrow street", "colorful facades", "blue sky", "Montepulciano", "Italy"} <= texts
    assert lines[1]["tags"] == []
    for tag in lines[0]["tags"]:
        assert set(tag) == {"text", "kind", "span", "score"}
        start, end = tag["span"]
        assert SENTENCE[start:end]
    file = tmp_path / "captions.txt"
    file.write_text(SENTENCE)
    assert "blue sky (attribute)" in run("mine", str(file)).stdout


def test_stores_and_info(server_address: str, shapes_root: Path, tmp_path: Path):
    [store] = json.loads(run("stores", "--root", str(shapes_root), "--json").stdout)
    remote = json.loads(run("info", f"grpc://{server_address}/shapes", "--json").stdout)
    assert remote == json.loads(run("stats", f"file://{shapes_root}/shapes", "--json").stdout) == store
    assert {"store", "version", "entries", "tags", "unique_tags", "fingerprint", "index"} <= set(remote)
    assert "shapes" in run("stores", "--root", str(shapes_root)).stdout
    assert "entries" in run("info", f"file://{shapes_root}/shapes").stdout
    assert "entries" in run("stats", f"file://{shapes_root}/shapes").stdout  # the former name
    assert "no stores" in run("stores", "--root", str(tmp_path)).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("query", "grpc://127.0.0.1:1/x", __file__), "no server answers"),
        (("query", "nonsense", __file__), "no URL of a store"),
        (("ingest", "/nowhere", "--root", "r", "--store", "s"), "/nowhere"),
        (("ingest", "/nowhere", "--root", "r", "--store", "a/b"), "no name for a store"),
        (("serve", "--root", "/nowhere"), "no directory"),
        (("stats", "file:///nowhere/x"), "no directory"),
        (("mine", "-", "--miner", "nope"), "nope"),
    ],
)
def test_errors_are_ours_and_name_the_fix(arguments: tuple[str, ...], message: str):
    with pytest.raises(TagstoreError, match=re.escape(message)):
        run(*arguments, stdin="a caption\n")


def test_an_error_is_one_line_on_stderr_and_exit_code_1(capsys, monkeypatch):
    from tagstore.cli import main

    monkeypatch.setattr("sys.argv", ["tagstore", "stats", "file:///nowhere/x"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_store_is_kept_from_the_command_line(tmp_path: Path):
    source = write_shapes(tmp_path / "shapes")
    (source / "bad.png").write_bytes(b"no image")
    (source / "bad.txt").write_text("A caption.")
    url = f"file://{tmp_path}/root/s"
    run("ingest", str(source), "--root", str(tmp_path / "root"), "--store", "s", "--device", "cpu")
    assert json.loads(run("quarantine", url).stdout)["key"] == "bad"
    assert json.loads(run("delete", url, "--key", "red-circle", "--json").stdout)["deleted"] == ["red-circle"]
    near = run("delete", url, "--near", str(source / "blue-square.png"), "--distance", "0")
    assert "deleted" in near.stdout
    versions = json.loads(run("versions", url, "--json").stdout)
    assert [v["operation"] for v in versions] == ["ingest", "delete", "delete"]
    assert "red-circle" in run("diff", url, "1", "3").stdout
    assert "red-circle" in json.loads(run("diff", url, "1", "3", "--json").stdout)["removed"]
    assert "red circle" in run("vocab", url, "--against", "1").stdout
    assert "white table" in run("vocab", url).stdout
    assert "holds what s@1 held: 18 entries" in run("rollback", url, "1").stdout
    assert "s is sound" in run("verify", url).stdout
    assert "nothing to repair" in run("repair", url).stdout
    assert "18 entries" in run("compact", url, "--keep", "1").stdout
    assert run("prove-absent", url, "--key", "red-circle").exit_code == 1
    purged = run("delete", url, "--key", "red-circle", "--purge", "--reason", "asked for")
    assert "took down 1 entries" in purged.stdout
    gone = run("prove-absent", url, "--key", "red-circle", "--image", str(source / "red-circle.png"))
    assert (gone.exit_code, gone.stdout) == (0, "nothing of it is in any file or record\n")
    assert json.loads(run("takedowns", url, "--json").stdout)[0]["reason"] == "asked for"
    bundle = str(tmp_path / "s.bundle")
    assert "s@6, 17 entries" in run("export", url, bundle, "--licence", "CC0-1.0").stdout
    imported = run("import", bundle, "--root", str(tmp_path / "root"), "--store", "copy")
    assert "copy@6: 17 entries" in imported.stdout
    with pytest.raises(TagstoreError, match="leave @1 out"):
        run("drop", url + "@1")
    run("rename", url, "t")
    run("drop", url.removesuffix("s") + "t")
    assert "t is back" in run("undrop", url.removesuffix("s") + "t").stdout
    with pytest.raises(TagstoreError, match="where the store is"):
        run("export", "grpc://127.0.0.1:1/s", bundle)
    with pytest.raises(TagstoreError, match="--reason"):
        run("delete", url.removesuffix("s") + "t", "--key", "x", "--purge")


def test_help_lists_every_command_once_by_job():
    text = run("--help").stdout
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    for name in cli.commands:
        assert lines.count(name) == 1
    sections = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections[1:] == [f"{job}:" for job in COMMANDS]
    assert "..." not in text.partition("Make a store")[2]


def test_every_option_of_serve_reaches_the_server(tmp_path: Path, monkeypatch):
    from tagstore.serving import server, settings, signals

    started: dict[str, object] = {}
    monkeypatch.setattr(signals, "run", lambda *_: None)
    monkeypatch.setattr(
        server, "Server", lambda root, address, **values: started.update(values, root=root, address=address)
    )
    numbers = {"threads": 3, "in_flight": 5, "per_client": 7}
    numbers |= {"message_bytes": 11 << 20, "image_bytes": 13 << 20}
    texts = {"tls_certificate": "c", "tls_key": "k", "tls_client_ca": "a", "tokens": "t", "anonymous": "read"}
    texts |= {"audit": "log", "metrics": "127.0.0.1:9"}
    flags = ("insecure", "tracing", "json_logs")
    arguments = ["--root", str(tmp_path), "--address", "127.0.0.1:0", "--device", "cpu", "--workers", "1"]
    limits = "--threads 3 --max-in-flight 5 --max-per-client 7 --max-message 11 --max-image 13"
    arguments += limits.split()
    for name, value in texts.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    monkeypatch.setattr("tagstore.serving.logs.use_json", lambda: None)
    run("serve", *arguments, *(f"--{name.replace('_', '-')}" for name in flags))
    assert (started["root"], started["address"], started["device"]) == (str(tmp_path), "127.0.0.1:0", "cpu")
    passed = started["settings"]
    assert isinstance(passed, settings.Settings)
    assert {name: getattr(passed.limits, name) for name in numbers} == numbers
    assert {name: getattr(passed, name) for name in texts} == texts
    assert all(getattr(passed, name) for name in flags)


def test_the_readme_names_every_command():
    text = README.read_text()
    for name in cli.commands:
        assert f"tagstore {name}" in text
