"""The maps of docs/architecture.md name every module there is, and no module that is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"


def mapped(package: str) -> list[str]:
    """Modules that the tables of a package name, as paths from the repository root, in the page's order."""
    modules, room = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        names = re.findall(r"`([\w/]+)`", line.split("|")[1]) if line.startswith("|") else []
        if not names:
            room = room if line.startswith("|") else ""
        elif not room:  # the first row of a table: the folder that the other rows are in
            room = names[0]
        elif room.partition("/")[0] == package:
            modules += [f"{room}/{name}.py" for name in names]
    return modules


@pytest.mark.parametrize("package", ["tagstore", "tuna_model"])
def test_every_module_is_mapped_once(package: str):
    named = mapped(package)
    files = (path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py"))
    modules = {name for name in files if not name.endswith(("/__init__.py", "/__main__.py"))}
    missing, stale = sorted(modules - set(named)), sorted(set(named) - modules)
    assert not missing, f"docs/architecture.md does not map {missing}"
    assert not stale, f"docs/architecture.md maps what is not there: {stale}"
    assert len(named) == len(modules), f"mapped twice: {sorted({n for n in named if named.count(n) > 1})}"
