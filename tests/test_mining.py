"""Captions become tags."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tagstore.errors import InvalidInput
from tagstore.mining import load_miner, mine

STREET = "A narrow street with colorful facades under the blue sky in Montepulciano, Italy"


def test_the_street_of_the_paper() -> None:
    (tags,) = mine([STREET])
    assert {"narrow street", "colorful facades", "blue sky", "Montepulciano", "Italy"} <= {tag.text for tag in tags}
    assert all(tag.caption == 0 for tag in tags)
    assert STREET[slice(*next(tag.span for tag in tags if tag.text == "blue sky"))] == "blue sky"


def test_an_unknown_miner_or_setting_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"no miner 'rulez': there are .*rules"):
        load_miner("rulez")
    with pytest.raises(InvalidInput, match=r"has no setting 'max_char': it has .*max_chars"):
        load_miner("rules", max_char=3)


def test_importing_the_package_loads_no_language_model() -> None:
    code = "import sys, tagstore.mining; sys.exit(bool({'spacy', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
