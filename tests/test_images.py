"""Every image comes out as upright RGB, everything else as one clear error."""

from __future__ import annotations

import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tagstore.encoding.images import decode, perceptual_hash
from tagstore.errors import BadImage


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photograph(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Something smooth, so that lossy formats keep it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def worst(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def png_header(width: int, height: int) -> bytes:
    """A PNG of a size that is claimed only: a valid header and one row's worth of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("JPEG", {"quality": 95}, 16),
        ("JPEG", {"quality": 95, "progressive": True}, 16),
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
    ],
)
def test_formats(format: str, options: dict[str, Any], tolerance: int):
    image = photograph()
    decoded = decode(encoded(image, format, **options))
    assert (decoded.mode, decoded.size) == ("RGB", image.size)
    assert worst(decoded, image) <= tolerance


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format: str):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode(data).getpixel((3, 3)) == (255, 0, 0)


def test_palette_and_one_bit():
    image = Image.new("RGB", (8, 6), (10, 200, 30))
    assert decode(encoded(image.quantize(4), "PNG")).getpixel((0, 0)) == (10, 200, 30)
    bits = Image.new("1", (8, 6), 1)
    bits.putpixel((2, 1), 0)
    decoded = decode(encoded(bits, "PNG"))
    assert (decoded.getpixel((2, 1)), decoded.getpixel((0, 0))) == ((0, 0, 0), (255, 255, 255))


def test_transparency_becomes_white():
    rgba = Image.new("RGBA", (4, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (200, 0, 0, 255))
    rgba.putpixel((2, 0), (0, 0, 0, 128))
    for data in (encoded(rgba, "PNG"), encoded(rgba, "WEBP", lossless=True)):
        decoded = decode(data)
        assert [decoded.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (200, 0, 0), (127, 127, 127)]
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (90, 255))
    decoded = decode(encoded(grey, "PNG"))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (90, 90, 90)]


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_becomes_white(mode: str):
    image = Image.new("RGB", (2, 1), (0, 0, 0))
    image.putpixel((1, 0), (200, 200, 200))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    transparent = image.getpixel((0, 0))
    decoded = decode(encoded(image, "PNG", transparency=transparent))
    assert (decoded.getpixel((0, 0)), decoded.getpixel((1, 0))) == ((255, 255, 255), (200, 200, 200))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(format: str):
    values = np.array([[0, 257, 12_850, 32_896, 65_535]], dtype=np.uint16)
    decoded = np.asarray(decode(encoded(Image.fromarray(values), format)))
    assert decoded[0, :, 0].tolist() == [0, 1, 50, 128, 255]
    assert (decoded[..., 0] == decoded[..., 2]).all()


def test_16_bit_grey_big_endian():
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(">HH", 0xFF00, 0x00FF))
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    assert np.asarray(decode(data))[0, :, 0].tolist() == [254, 1]


def test_wide_grey_is_stretched_from_its_own_range():
    integers = np.array([[-1000, 0, 1000]], dtype=np.int32)
    floats = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
    assert np.asarray(decode(encoded(Image.fromarray(integers), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(decode(encoded(Image.fromarray(floats), "TIFF")))[0, :, 0].tolist() == [0, 128, 255, 0]
    with pytest.raises(BadImage, match="no finite"):
        decode(encoded(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)), "TIFF"))


def test_cmyk_of_adobe_and_without_adobes_marker():
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    adobe = encoded(cyan, "JPEG", quality=95)  # Pillow writes what Adobe does: inverted, with the marker
    start = adobe.index(b"\xff\xee")
    length = struct.unpack(">H", adobe[start + 2 : start + 4])[0]
    assert adobe[start + 4 : start + 9] == b"Adobe"
    inverted = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 255)), "JPEG", quality=95)
    plain = inverted[:start] + inverted[start + 2 + length :]
    for data in (adobe, plain, encoded(cyan, "TIFF")):
        assert worst(decode(data), Image.new("RGB", (16, 16), (0, 255, 255))) <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(format: str, orientation: int):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 8))  # red is the upper left quarter
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that takes upright to stored
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encoded(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {})))
    assert decoded.size == (32, 16)
    assert (
        worst(decoded.resize((4, 2), Image.Resampling.BOX), upright.resize((4, 2), Image.Resampling.BOX))
        <= 20
    )


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_means_nothing_is_ignored(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encoded(photograph(), "JPEG", exif=exif)).size == (96, 64)


def test_damaged_exif_keeps_the_picture_and_warns_nobody():
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x05\0\xff\xff\xff\xff\xff\xff\xff\xff" * 3
    data = encoded(photograph(), "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        assert decode(data).size == (96, 64)
        assert list(warnings.filters) == before


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_truncation_is_a_clear_error_or_an_image(format: str):
    data = encoded(photograph(), format)
    with pytest.raises(BadImage, match=r"again"):
        decode(data[: len(data) // 2])
    for end in range(1, len(data), max(1, len(data) // 150)):
        with suppress(BadImage):
            assert decode(data[:end]).size == (96, 64)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_bytes_never_raise_anything_else(format: str):
    data = encoded(photograph(), format)
    random = np.random.default_rng(7)
    refused = 0
    for _ in range(150):
        damaged = np.frombuffer(data, dtype=np.uint8).copy()
        places = random.integers(0, min(len(data), 400), 8)
        damaged[places] = random.integers(0, 256, 8)
        try:
            assert decode(damaged.tobytes(), max_pixels=1_000_000).mode == "RGB"
        except BadImage:
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"A caption that somebody saved as photo.jpg\n", "not an image.*A caption"),
        (b"<html><body>404 Not Found", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a format that is not read: SVG, give JPEG"),
        (b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg>", "a format that is not read: SVG"),
        (b"II*\0\x10\0\0\0CR\x02\0", "a format that is not read: a camera's raw file"),
        (b"\0\0\0\x0cJXL \r\n", "a format that is not read: JPEG XL"),
        (b"\0\0\0\x1cftypisom", "not an image but a video"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "damaged or truncated AVIF"),
        (b"\0\0\0\x1cftypheic\0\0\0\0", "damaged or truncated HEIF"),
        (b"\xff\xd8\xff", "damaged or truncated JPEG"),
        (b"\x89PNG\r\n\x1a\n", "damaged or truncated PNG"),
        (b"GIF89a", "damaged or truncated GIF"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "damaged or truncated WEBP"),
        (b"\0" * 64, "not an image"),
    ],
)
def test_what_is_no_image(data: bytes, message: str):
    with pytest.raises(BadImage, match=message):
        decode(data)


@pytest.mark.parametrize(
    ("width", "height"),
    [(30_000, 30_000), (2_000_000_000, 2_000_000_000), (1, 2_000_000_000), (100_001, 1000)],
)
def test_a_decompression_bomb_is_refused_from_its_header(width: int, height: int):
    with pytest.raises(BadImage, match=r"too large: .*more than the limit of 100,000,000 in all.*max_pixels"):
        decode(png_header(width, height))


def test_no_pixels():
    with pytest.raises(BadImage):
        decode(png_header(0, 10))


@pytest.mark.parametrize("format", ["GIF", "BMP"])
def test_bombs_of_other_formats(format: str):
    data = bytearray(encoded(Image.new("P", (8, 8)), format))
    place = {"GIF": 6, "BMP": 18}[format]
    size = struct.pack("<HH", 60_000, 60_000) if format == "GIF" else struct.pack("<ii", 60_000, 60_000)
    data[place : place + len(size)] = size
    with pytest.raises(BadImage, match="limit"):
        decode(bytes(data))


def test_the_limit_is_an_option_and_no_pillow_limit_interferes():
    data = encoded(Image.new("1", (10_000, 9_500)), "PNG")  # beyond Pillow's own warning at 89 million
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data).size == (10_000, 9_500)
    with pytest.raises(BadImage, match="limit of 1,000"):
        decode(encoded(photograph(), "PNG"), max_pixels=1000)


def test_threads_get_what_one_thread_gets():
    data = [
        encoded(photograph(seed=seed), format)
        for seed in range(8)
        for format in ("JPEG", "PNG", "WEBP", "GIF")
    ]
    data.append(encoded(photograph(), "JPEG")[:300])

    def outcome(item: bytes) -> bytes | str:
        try:
            return decode(item).tobytes()
        except BadImage as error:
            return str(error)

    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, data * 4)) == [outcome(item) for item in data] * 4
    assert list(warnings.filters) == before


def test_perceptual_hash_keeps_through_scaling_and_tells_pictures_apart():
    image = photograph(640, 480)
    value = perceptual_hash(image)
    assert 0 <= value < 2**64
    assert value == perceptual_hash(image.copy())
    smaller = decode(encoded(image.resize((320, 240)), "JPEG", quality=80))
    assert (value ^ perceptual_hash(smaller)).bit_count() <= 6
    assert (value ^ perceptual_hash(photograph(640, 480, seed=1))).bit_count() > 12
    assert isinstance(perceptual_hash(Image.new("RGB", (1, 1))), int)
    assert isinstance(perceptual_hash(Image.new("RGB", (5000, 2))), int)


def test_a_strip_that_would_become_gigabytes_is_refused():
    buffer = BytesIO()
    Image.new("L", (1, 3000)).save(buffer, "PNG")
    with pytest.raises(BadImage, match="a strip of more than 100 to 1"):
        decode(buffer.getvalue())
