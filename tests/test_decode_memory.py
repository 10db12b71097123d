"""What decoding takes is estimated before it is taken, and all threads together stay within a limit."""

from __future__ import annotations

import subprocess
import sys
import threading
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tagstore.encoding import images
from tagstore.encoding.decode_memory import MemoryBudget, decoding_bytes, reading_bytes
from tagstore.encoding.images import decode, decoding
from tagstore.errors import BadImage
from test_images import encoded
from waiting import wait_until

SIDE = 1500


def large(mode: str) -> Image.Image:
    """A picture of more than one band, in a mode."""
    tile = np.random.default_rng(0).integers(0, 255, (50, 50), dtype=np.uint8)
    grey = Image.fromarray(np.tile(tile, (SIDE // 50, SIDE // 50)))
    match mode:
        case "I;16":
            return Image.fromarray(np.asarray(grey).astype(np.uint16) * 200)
        case "I" | "F":
            values = np.asarray(grey).astype({"I": np.int32, "F": np.float32}[mode]) * 1000
            values[0, :5] = 0
            return Image.fromarray(values)
        case "P":
            return grey.convert("RGB").quantize(8)
        case "L":
            return grey
    return Image.merge(mode, [grey.rotate(90 * i) for i in range(len(mode))])


KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("RGB", "PNG", {}),
    ("RGB", "PNG", {"orientation": 6}),
    ("RGBA", "PNG", {"orientation": 6}),
    ("LA", "PNG", {}),
    ("P", "PNG", {"transparency": 3}),
    ("I;16", "PNG", {}),
    ("RGB", "JPEG", {"orientation": 6}),
    ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    ("CMYK", "JPEG", {"progressive": True, "subsampling": 0}),
    ("RGB", "WEBP", {"quality": 10, "method": 0}),
    ("RGBA", "WEBP", {"lossless": True, "method": 0}),
    ("I", "TIFF", {"compression": "tiff_deflate"}),
    ("F", "TIFF", {"compression": "tiff_deflate"}),
    ("RGBA", "TIFF", {"compression": "tiff_deflate"}),
    ("RGBA", "TIFF", {"compression": "tiff_deflate", "one_strip": True}),
    ("CMYK", "TIFF", {"compression": "tiff_lzw", "one_strip": True}),
    ("YCbCr", "TIFF", {"compression": "jpeg", "one_strip": True}),
    ("P", "GIF", {}),
    ("P", "BMP", {}),
]


def in_format(mode: str, format: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> bytes:
    options = dict(options)
    if options.pop("one_strip", False):
        monkeypatch.setattr(TiffImagePlugin, "STRIP_SIZE", 1 << 30)
    if orientation := options.pop("orientation", 0):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    if format == "PNG":
        options["compress_level"] = 1
    image = large("RGB").convert("YCbCr") if mode == "YCbCr" else large(mode)
    return encoded(image, format, **options)


PEAK = """
import gc, sys
from tagstore.encoding import images
from pathlib import Path

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10

folder = Path(sys.argv[1])
images.decode((folder / "small.png").read_bytes())  # imports what it needs
for file in sorted(folder.glob("*.picture")):
    data = file.read_bytes()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    images.decode(data)
    print(file.stem, status("VmHWM") - before, flush=True)
"""


def peaks(folder: Path) -> dict[str, int]:
    """Return the bytes that decoding takes at most, of each file, in a process that keeps no free memory."""
    (folder / "small.png").write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    return {name: int(size) for name, size in (line.split() for line in run.stdout.splitlines())}


def test_the_estimate_is_what_decoding_takes_or_a_little_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = {}
    for number, (mode, format, options) in enumerate(KINDS):
        with monkeypatch.context() as patch:
            pictures[str(number)] = data = in_format(mode, format, options, patch)
        (tmp_path / f"{number}.picture").write_bytes(data)
    for name, taken in peaks(tmp_path).items():
        data = pictures[name]
        image = Image.open(BytesIO(data))
        estimate = reading_bytes(data, image.format) + decoding_bytes(image)
        # half a megabyte of other things
        assert taken <= 1.02 * estimate + (1 << 19), (KINDS[int(name)], taken / SIDE**2, estimate / SIDE**2)
        assert estimate <= 5 * taken, (KINDS[int(name)], taken, estimate)


@pytest.mark.parametrize(("mode", "format", "options"), KINDS)
def test_bands_make_what_the_whole_makes(
    mode: str, format: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = in_format(mode, format, options, monkeypatch)
    decoded = decode(data)
    monkeypatch.setattr(images, "BAND_PIXELS", SIDE**2)
    assert decoded.size == (SIDE, SIDE)
    assert decoded.tobytes() == decode(data).tobytes()


def test_all_threads_together_stay_within_the_limit() -> None:
    data = encoded(Image.new("RGB", (100, 100)), "PNG")
    size = decoding_bytes(Image.open(BytesIO(data)))
    budget = MemoryBudget(2 * size)
    go, inside = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        with decoding(data, memory=budget):
            inside.release()
            assert go.wait(60)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    inside.acquire()
    inside.acquire()
    wait_until(lambda: len(budget._queue) == 3)
    assert budget.held == 2 * size
    go.set()
    for thread in threads:
        thread.join(60)
    assert budget.held == 0


def test_a_large_picture_is_not_kept_waiting_by_small_ones() -> None:
    budget, order = MemoryBudget(10), []

    def work(name: str, size: int) -> None:
        with budget.hold(size):
            order.append(name)

    with budget.hold(5):
        large = threading.Thread(target=work, args=("large", 9))
        large.start()
        wait_until(lambda: len(budget._queue) == 1)
        small = threading.Thread(target=work, args=("small", 1))
        small.start()
        wait_until(lambda: len(budget._queue) == 2)
    large.join(60)
    small.join(60)
    assert order == ["large", "small"]


def test_what_never_fits_is_refused() -> None:
    data = encoded(Image.new("RGB", (1000, 1000)), "PNG")
    with (
        pytest.raises(BadImage, match="decoding it takes 17 MiB, more than the limit of 1 MiB"),
        decoding(data, memory=MemoryBudget(1 << 20)),
    ):
        pass


def segments(marker: bytes, count: int) -> bytes:
    picture = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return picture[:2] + marker * count + picture[2:]


def chunks(name: bytes, data: bytes, count: int = 1) -> bytes:
    picture = encoded(Image.new("RGB", (8, 8)), "PNG")
    chunk = len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    return picture[:33] + chunk * count + picture[33:]


@pytest.mark.parametrize(
    "data",
    [segments(b"\xff\xe5\0\2", 200_000), segments(b"\xff\xfe\0\2", 200_000), chunks(b"teSt", b"", 200_000)],
)
def test_a_picture_of_nothing_but_segments_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage, match="more than 10000 segments"):
        decode(data)


def test_text_and_numbers_beside_the_pixels_are_counted() -> None:
    texts = chunks(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))
    assert decode(texts).size == (8, 8)
    assert reading_bytes(texts, "PNG") > 5 << 20
    image = Image.new("RGB", (8, 8))
    numbers = encoded(image, "TIFF", tiffinfo={65000: tuple(range(70_000, 170_000))})
    assert decode(numbers).size == (8, 8)
    assert 4_800_000 <= reading_bytes(numbers, "TIFF") < 5_000_000
    for ordinary in ({"big_tiff": True}, {"big_tiff": False}):
        assert not reading_bytes(encoded(image, "TIFF", **ordinary), "TIFF")


def test_a_tile_larger_than_its_picture_is_counted() -> None:
    image = Image.open(BytesIO(encoded(Image.new("RGB", (8, 8)), "TIFF")))
    image.tag_v2[322], image.tag_v2[323] = 50_000, 50_000
    assert decoding_bytes(image) >= 3 * 50_000**2
