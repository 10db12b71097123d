"""The demo's parts: it fetches pictures, splits them, and writes a complete and safe page."""

from __future__ import annotations

import importlib.util
import io
import re
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tagstore.errors import InvalidInput
from tagstore.readers import Columns, read
from tagstore.types import Fingerprint, Neighbour, Pair, Retrieval, RetrievedTag, StoreInfo

SCRIPTS = Path(__file__).parent.parent / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stamps = load("fetch_stamps")
demo = load("demo")


def png(colour: str, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


# --- pictures


@pytest.fixture
def debian(tmp_path: Path, monkeypatch) -> Path:
    """A machine whose `apt-get` and `dpkg-deb` are scripts: a package is a tar, `calls` lists calls."""
    machine = tmp_path / "machine"
    machine.mkdir()
    root = "./usr/share/tuxpaint/stamps"
    files = {
        "animals/cat.png": png("red"),
        "animals/cat.txt": "A cat — “Felix”.\nde.utf8=Eine Katze.\n".encode(),
        "animals/cat.ogg": b"sound",
        "animals/dog.svg": b"<svg/>",
        "animals/dog.txt": b"A dog.\n",
        "animals/cow_mirror.png": png("blue"),
        "symbols/alphabets/a.png": png("blue"),
        "symbols/alphabets/a.txt": b"The letter A.\n",
        "plants/tree.txt": b"A tree.",
        "plants/tree.png": png("green"),
    }
    with tarfile.open(machine / "package", "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{root}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for tool, script in {
        "apt-get": f'echo "$@" >> {machine}/calls\ncase "$*" in *download*) {machine}/download "$@";; esac',
        "download": f"/bin/cp {machine}/package stamps_1_all.deb",
        "dpkg-deb": '/bin/cat "$2"',
    }.items():
        (machine / tool).write_text(f"#!/bin/sh\n{script}\n")
        (machine / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(machine))
    return machine


def test_pictures_come_from_the_package_and_are_kept(tmp_path: Path, debian: Path):
    out = stamps.fetch(tmp_path / "demo/pictures")
    items = {item.key: item for item in read(str(out))}
    captions = {"animals/cat": ("A cat — “Felix”.",), "plants/tree": ("A tree.",)}
    assert {key: item.captions for key, item in items.items()} == captions
    assert items["animals/cat"].image == png("red")
    assert [path.name for path in out.parent.iterdir()] == ["pictures"]
    (debian / "apt-get").unlink()
    assert stamps.fetch(out) == out


def test_a_machine_without_package_lists_gets_its_own(tmp_path: Path, debian: Path):
    download = f"*Dir::State::Lists=*) /bin/cp {debian}/package x.deb;;"
    script = f'case "$*" in {download} *) echo "E: Unable to locate" >&2; exit 100;; esac'
    (debian / "download").write_text(f"#!/bin/sh\n{script}\n")
    assert len(list(read(str(stamps.fetch(tmp_path / "pictures"))))) == 2
    first, update, second = (debian / "calls").read_text().splitlines()
    assert "-o" not in first
    assert update.endswith("update")
    assert "Dir::Cache=" in second


def test_no_apt_is_one_clear_line(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    message = r"error: no apt-get and no dpkg-deb on this machine .* make demo DATA=path"
    assert re.fullmatch(message, str(stopped.value.code))
    assert not (tmp_path / "demo").exists()


def test_no_network_is_one_clear_line(tmp_path: Path, debian: Path):
    (debian / "download").write_text(
        "#!/bin/sh\necho 'W: first' >&2\necho 'E: Failed to fetch http://deb.example.org' >&2\nexit 100\n"
    )
    message = r"E: Failed to fetch http://deb.example.org\): check the network, or .* make demo DATA=path"
    with pytest.raises(stamps.NoPictures, match=message):
        stamps.fetch(tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()


# --- split


@pytest.mark.parametrize(("count", "held"), [(2, 1), (50, 5), (430, 40)])
def test_split(tmp_path: Path, count: int, held: int):
    lines = [f"1.png,caption {i},in/{i % 7}/../k.{i}\n" for i in range(count)]
    (tmp_path / "1.png").write_bytes(png("red"))
    (tmp_path / "t.csv").write_text("image,caption,key\n" + "".join(lines))
    kept = []
    for run in ("a", "b"):
        train, heldout = tmp_path / run / "train", tmp_path / run / "heldout"
        answer = demo.split(str(tmp_path / "t.csv"), None, Columns(), train, heldout)
        assert len(answer) == held
        assert [pair.key for pair in answer] == sorted(pair.key for pair in answer)
        parts = [
            {item.captions[0] for item in read(str(folder)) if isinstance(item, Pair)}
            for folder in (train, heldout)
        ]
        assert parts[1] == {pair.captions[0] for pair in answer}
        assert parts[0] | parts[1] == {f"caption {i}" for i in range(count)}
        assert not parts[0] & parts[1]
        kept.append(parts[1])
    assert kept[0] == kept[1]


def test_too_few_pictures(tmp_path: Path):
    (tmp_path / "1.png").write_bytes(png("red"))
    (tmp_path / "1.txt").write_text("alone")
    with pytest.raises(InvalidInput, match="at least two captioned pictures"):
        demo.split(str(tmp_path), None, Columns(), tmp_path / "out/train", tmp_path / "out/heldout")


def test_odd_keys_make_names_that_stay_in_the_folder(tmp_path: Path):
    for key in ("../../etc/x", "/etc/x", "a b?.*[x]", "日本/猫", "", "x" * 300):
        demo.write(tmp_path / "train", Pair(key, png("red"), (f"key {key}", "second")))
    assert {path.name for path in tmp_path.iterdir()} == {"train"}
    got = {item.captions[0] for item in read(str(tmp_path / "train")) if isinstance(item, Pair)}
    assert got == {"key ../../etc/x", "key /etc/x", "key a b?.*[x]", "key 日本/猫", "key", "key " + "x" * 300}
    for item in read(str(tmp_path / "train")):
        assert demo.picture(tmp_path / "train", item.key) == (item.image, item.captions[0])


# --- page

EVIL = '<script>alert("1")</script>'


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        sources = ("src", "href", "srcset", "data", "action", "poster")
        self.loads += [value or "" for name, value in attributes if name in sources]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def sample(tags: int = 12) -> tuple[list[object], StoreInfo]:
    neighbours = tuple(Neighbour(f"in/{EVIL}{i}", i, 0.9 - i / 10) for i in range(5))
    retrieved = tuple(
        RetrievedTag(i, f"tag {i}" if i else f"Red {EVIL}", "object", 0.9, 1 + i % 5, -0.001 * i, (i % 5,))
        for i in range(tags)
    )
    retrieval = Retrieval("demo", 3, "0" * 16, neighbours, retrieved)
    answers = (f"with {EVIL} tag 1", "a bare answer", "tag 2 in words")
    captions = (f"a red {EVIL} & co", "second caption")
    asked = demo.Asked(
        f"key {EVIL}", png("red", (900, 300)), captions, retrieval, answers, frozenset({"tag 1"})
    )
    fingerprint = Fingerprint("mini", "x", {}, False, True, 512)
    created = "2026-01-01T00:00:00+00:00"
    return [asked], StoreInfo("demo", 3, 1498, 5, 4, fingerprint, {"kind": "flat"}, created)


def render(asked: list[object], info: StoreInfo) -> str:
    seconds = {"embed": 2.5, "ask": 0.25}
    return demo.render(asked, info, seconds, f"origin {EVIL}", lambda key: (png("blue"), f"neighbour {EVIL}"))


def test_the_page_shows_everything():
    page = Page(render(*sample()))
    shown = " ".join(page.texts)
    for text in ("demo@3", "1,498 entries", "mini", "flat", "embed", "2.5", "second caption", "tag 11"):
        assert text in shown, text
    for text in ("0.90", "2 more", "1 picture", "a bare answer"):
        assert text in shown, text
    assert "For 1 of 1 unseen pictures" in shown
    assert "TUNA names a thing of that description for 1 of 1; without the store for 0" in shown
    assert page.tags.count("mark") == 2  # words that came from a tag
    assert "-0.00" not in shown
    assert page.tags.count("img") == 6
    assert page.tags.count("article") == 1


def test_the_page_is_self_contained_and_escapes_what_it_is_given():
    text = render(*sample())
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert len(page.loads) == 6
    assert all(load.startswith("data:image/webp;base64,") for load in page.loads)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text
    assert f"key {EVIL}" in page.texts
    assert text.count("<script") == 0


def test_a_page_without_tags_and_one_without_pictures():
    assert "No tags" in render(*sample(tags=0))
    assert "0 pictures" in render([], sample()[1])


def test_a_tag_is_named_by_whole_words():
    tag = sample()[0][0].retrieval.tags[1]  # type: ignore[attr-defined]
    assert demo.named(tag, ("x", "A TAG 1, here"))
    assert not demo.named(tag, ("tag 12", "atag 1"))
