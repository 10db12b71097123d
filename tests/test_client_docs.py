"""docs/client.md lists every option, and its example without our client works."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from pictures import picture
from tagstore.client import ConnectOptions, SearchOptions
from tagstore.client.options import Options
from tagstore.types import Search

DOCS = (Path(__file__).parent.parent / "docs" / "client.md").read_text()


def test_every_option_is_documented_and_typed():
    options = {f.name for f in (*fields(Options), *fields(Search))} - {"search"}
    table = DOCS.split("## Options")[1].split("\n## ")[0]
    documented = {
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert documented == options
    assert set(ConnectOptions.__annotations__) == options
    assert set(SearchOptions.__annotations__) == {f.name for f in fields(Search)} | {
        "exclude_distance",
        "exclude_keys",
        "on_failure",
        "preload",
    }


def test_the_example_without_our_client_works_and_has_twenty_lines(server_address: str, tmp_path: Path):
    code = DOCS.split("<!-- bare stub -->\n```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 20
    assert "tagstore.client" not in code
    (tmp_path / "photo.png").write_bytes(picture("red", "circle"))
    command = [sys.executable, "-c", code, server_address, "shapes", str(tmp_path / "photo.png")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.startswith("shapes 1 ")
    assert "KIND_OBJECT" in out
