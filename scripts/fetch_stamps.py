"""Fetch the demo's pictures: photographs and drawings of Tux Paint with captions, from a Debian package.

`apt-get download` needs no root rights and checks signatures; nothing is installed. Letters, symbols and SVGs
are left out.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

PACKAGE = "tuxpaint-stamps-default"
_STAMPS = PurePosixPath("usr/share/tuxpaint/stamps")
_INSTEAD = "pass a folder of your own captioned pictures instead: make demo DATA=path"


class NoPictures(Exception):
    """Why the pictures are missing, and what to do."""


def fetch(out: Path) -> Path:
    """Make `out` a folder of PNGs with same-name .txt unless it exists. Raises `NoPictures`."""
    if out.is_dir():
        return out
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise NoPictures(
            f"no {' and no '.join(missing)} on this machine to fetch the demo's pictures from Debian: "
            f"{_INSTEAD}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="fetching-") as folder:
        package = _download(Path(folder))
        pictures = Path(folder, "pictures")
        _unpack(package, pictures)
        pictures.rename(out)  # in one step: a half-filled folder is never taken for a whole one
    return out


def _download(folder: Path) -> Path:
    error = _apt(folder, "download", PACKAGE)
    if error:
        # a fresh container has no package lists, and only root may write the machine's: fetch private ones
        for inner in ("lists/partial", "cache/archives/partial"):
            Path(folder, inner).mkdir(parents=True)
        lists, cache = f"Dir::State::Lists={folder}/lists", f"Dir::Cache={folder}/cache"
        private = ["-o", lists, "-o", cache, "-o", "APT::Sandbox::User=root"]
        # a mirror that fails does not matter unless it is the one with the package
        _apt(folder, *private, "update")
        error = _apt(folder, *private, "download", PACKAGE)
    packages = list(folder.glob("*.deb"))
    if error or not packages:
        raise NoPictures(f"apt-get could not download {PACKAGE} ({error}): check the network, or {_INSTEAD}")
    return packages[0]


def _apt(folder: Path, *arguments: str) -> str:
    """Run apt-get. Returns the last line of its errors, empty if it succeeded."""
    done = subprocess.run(
        ["apt-get", "-q", *arguments],
        cwd=folder.resolve(),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else ""


def _unpack(package: Path, out: Path) -> None:
    """Write the captioned pictures; the package also holds sounds and translations."""
    images: dict[PurePosixPath, bytes] = {}
    captions: dict[PurePosixPath, str] = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isfile() or _STAMPS not in path.parents or path.suffix not in (".png", ".txt"):
                    continue
                name, content = path.relative_to(_STAMPS), tar.extractfile(member)
                if content is None or name.parts[0] == "symbols" or ".." in name.parts:
                    continue
                if path.suffix == ".png":
                    images[name] = content.read()
                else:
                    # the first line is English, the others are `language=translation`
                    captions[name] = content.read().decode("utf-8", "replace").partition("\n")[0].strip()
    captioned = [name for name in sorted(images) if captions.get(name.with_suffix(".txt"))]
    if not captioned:
        raise NoPictures(f"{package.name} holds no captioned pictures where they used to be: {_INSTEAD}")
    for name in captioned:
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(images[name])
        target.with_suffix(".txt").write_text(captions[name.with_suffix(".txt")] + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    try:
        print(fetch(parser.parse_args().out))
    except NoPictures as problem:
        sys.exit(f"error: {problem}")
