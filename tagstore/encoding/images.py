"""Decode untrusted image bytes. Nothing else in the project decodes them.

    bytes ──signature──▶ Pillow plugin ──size in the header──▶ pixels ──mode, rotation──▶ upright RGB, 8 bits
                                            memory for it

Only decoders that run inside this process are used (no EPS, which starts Ghostscript). Colour profiles are
ignored, as open_clip's own preprocessing does.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from io import BytesIO
from typing import Any, cast

import imagehash
import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageChops,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from tagstore.encoding.decode_memory import BAND_PIXELS, SHARED, MemoryBudget, decoding_bytes, reading_bytes
from tagstore.errors import BadImage
from tagstore.types import Identity

MAX_PIXELS = 100_000_000
FORMATS = "JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP or TIFF"


class _Heif:
    """The plugin of pillow-heif, which is loaded for the first picture that needs it."""

    format = "HEIF"

    def __call__(self, file: BytesIO) -> Image.Image:
        from pillow_heif import as_plugin

        image: Image.Image = cast(Any, as_plugin).HeifImageFile(file)
        return image


# The signature decides, never the file's name. Calling a plugin directly leaves out what `Image.open` would
# add: a guess over all plugins, and a bomb check against a process-wide limit that is not ours to set.
_PLUGINS: tuple[tuple[re.Pattern[bytes], Any], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), AvifImagePlugin.AvifImageFile),
    (re.compile(rb"....ftyp(hei[cmsx]|hev[cx]|mif1|msf1)", re.DOTALL), _Heif()),
    # cameras' raw files begin as TIFF does, and say more behind it
    (re.compile(rb"(?!II\*\0....CR)(II[*+]\0|MM\0[*+])", re.DOTALL), TiffImagePlugin.TiffImageFile),
)
_UNREAD, _NO_PICTURE = "a format that is not read: ", "not an image but "
_OTHERS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"II\*\x00....CR|FUJIFILM|....ftypcrx", re.DOTALL), _UNREAD + "a camera's raw file"),
    (re.compile(rb"\x00\x00\x00\x0cjP  |\xffO\xffQ"), _UNREAD + "JPEG 2000"),
    (re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "), _UNREAD + "JPEG XL"),
    (re.compile(rb"\s*(<[?!][^>]*>\s*)*<svg"), _UNREAD + "SVG"),
    (re.compile(rb"8BPS"), _UNREAD + "Photoshop"),
    (re.compile(rb"\x00\x00\x01\x00"), _UNREAD + "an icon"),
    (re.compile(rb"%PDF|%!PS"), _NO_PICTURE + "PDF or PostScript"),
    (re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE), _NO_PICTURE + "a web page"),
    (re.compile(rb"....ftyp|\x1aE\xdf\xa3", re.DOTALL), _NO_PICTURE + "a video"),
)
"""What else comes under the name of a picture, so that the reason can name it."""

# EXIF orientation (CIPA DC-008, tag 0x0112) -> the transpose that turns the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


MAX_ASPECT = 100
"""Longest side over shortest: encoders scale the shortest up, and a strip would become gigabytes."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of an encoded image to upright RGB with 8 bits a channel.

    Safe to call from many threads. Whoever decodes large images in many uses `decoding`.

    Transparent parts become white: the colour stored under full transparency is arbitrary (mostly black) and
    would otherwise decide the vector, and pictures with alpha (products, clip art) are made for white pages.
    16-bit grey is scaled by its full range; 32-bit and float grey, which have no agreed range, from their own
    minimum and maximum.

    Raises `BadImage` for anything that is no image, is cut off or damaged, or has more than `max_pixels`
    pixels; the size is read from the header before any pixel is decoded.
    """
    with decoding(data, max_pixels=max_pixels) as image:
        return image


@contextmanager
def decoding(
    data: bytes, *, max_pixels: int = MAX_PIXELS, memory: MemoryBudget = SHARED
) -> Iterator[Image.Image]:
    """Decode as `decode` does, and hold what the image takes of `memory` until the block ends."""
    if not data:
        raise BadImage("the image is empty: 0 bytes, fetch or export it again")
    plugin = next((plugin for signature, plugin in _PLUGINS if signature.match(data)), None)
    if plugin is None:
        head = bytes(data[:1024])
        for signature, name in _OTHERS:
            if signature.match(head):
                raise BadImage(f"{name}, give {FORMATS}")
        raise BadImage(f"not an image of a known format: it starts with {head[:16]!r}, give {FORMATS}")
    with _reading(data, plugin.format or "image"):
        metadata = reading_bytes(data, plugin.format)
        with memory.hold(metadata):
            image = plugin(BytesIO(data))
            width, height = image.size
            _check_size(width, height, max_pixels)
            size = metadata + decoding_bytes(image)
        if metadata:
            del image  # its metadata must not wait beside that of others
    with memory.hold(size):
        with _reading(data, plugin.format or "image"):
            if metadata:
                image = plugin(BytesIO(data))
            image.load()
            orientation = _orientation(image)
            upright = _to_rgb(image)
            del image
            if orientation in _UPRIGHT:
                upright = upright.transpose(_UPRIGHT[orientation])
        yield upright


@contextmanager
def _reading(data: bytes, name: str) -> Iterator[None]:
    """Turn whatever reading an image raises into `BadImage`."""
    with _quiet():
        try:
            yield
        except BadImage:
            raise
        except Image.DecompressionBombError as error:
            raise BadImage(f"the image is too large: {error}; shrink it") from error
        except MemoryError as error:
            raise BadImage(
                "the image is too large: not enough memory to decode it; shrink it, or lower max_pixels"
            ) from error
        except (
            Exception
        ) as error:  # decoders answer damaged bytes with any exception at all; each means the same
            raise BadImage(
                f"damaged or truncated {name}: {error} ({len(data)} bytes), fetch or export it again"
            ) from error


def suffix_of(data: bytes) -> str:
    """The file suffix of an encoded image: `jpg`, `png` ..., or `bin` for an unknown format."""
    plugin = next((plugin for signature, plugin in _PLUGINS if signature.match(data)), None)
    return {"JPEG": "jpg"}.get(plugin.format, plugin.format.lower()) if plugin else "bin"


def perceptual_hash(image: Image.Image) -> int:
    """64-bit perceptual hash (DCT of a 32 x 32 grey reduction): near-duplicates differ in few bits.

    Unsigned.
    """
    # Box reduction to 64..127 pixels a side first: the hash only looks at 32 x 32, and converting and
    # resizing all pixels costs more.
    image = image.reduce((max(1, image.width // 64), max(1, image.height // 64)))
    return int(str(imagehash.phash(image)), 16)


def identify(data: bytes, image: Image.Image, key: str = "") -> Identity:
    """The identity of an encoded image, `image` its decoded form: key, sha256 and perceptual hash."""
    return Identity(key, sha256(data).digest(), perceptual_hash(image))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImage(f"the image is empty: its header says {width} x {height} pixels")
    if width * height > max_pixels:
        raise BadImage(
            f"the image is too large: its header says {width} x {height} pixels, more than the limit of "
            f"{max_pixels:,} in all; shrink it, or raise max_pixels if you trust it"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(
            f"the image is {width} x {height} pixels: a strip of more than {MAX_ASPECT} to 1 shows nothing; "
            "crop it"
        )


def _orientation(image: Image.Image) -> int:
    try:
        return cast(int, image.getexif().get(0x0112, 1))
    except Exception:  # noqa: BLE001  damaged EXIF beside good pixels is common on the web: the picture is worth more than its rotation
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image, in bands, so that little beside it and the result is in memory."""
    transparent = image.has_transparency_data
    if image.mode == "RGB" and not transparent:
        return image._new(image.im)  # its pixels, and nothing that its decoder holds
    rgb = Image.new("RGB", image.size)
    convert = _converter(image, transparent)
    for band in _bands(image):
        rgb.paste(convert(image if band[3] == image.height and not band[1] else image.crop(band)), band)
    return rgb


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(image.height, top + rows)


def _converter(image: Image.Image, transparent: bool) -> Callable[[Image.Image], Image.Image]:
    """Return what converts a part of an image to RGB."""
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Adobe writes CMYK inverted, and Pillow takes every CMYK JPEG for Adobe's.
        return lambda part: ImageChops.invert(part).convert("RGB")
    if image.mode.startswith("I;16"):
        return _sixteen_bits
    if image.mode.startswith(("I", "F")):
        low, high = _extremes(image)
        return lambda part: _stretched(part, low, high)
    if transparent:
        return _on_white
    return lambda part: part.convert("RGB")


def _on_white(part: Image.Image) -> Image.Image:
    rgba = part.convert("RGBA")
    white = Image.new("RGB", part.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _sixteen_bits(part: Image.Image) -> Image.Image:
    values = np.asarray(part)
    grey = (values / 257 + 0.5).astype(np.uint8)
    if "transparency" in part.info:
        grey[values == part.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _extremes(image: Image.Image) -> tuple[float, float]:
    """Return the least and the largest finite value. Raises `BadImage` if there is none."""
    low, high = np.inf, -np.inf
    for band in _bands(image):
        values = np.asarray(image.crop(band))
        values = values[np.isfinite(values)]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low > high:
        raise BadImage("the image is empty: it has no finite pixel values, export it again")
    return low, high


def _stretched(part: Image.Image, low: float, high: float) -> Image.Image:
    values = np.asarray(part).astype(np.float64)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / max(high - low, 1e-300))
    return Image.fromarray((scaled + 0.5).astype(np.uint8)).convert("RGB")


_IGNORE_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings (about damaged EXIF, mostly), which nobody can act on among a million images.

    `warnings.catch_warnings` swaps the whole list of filters and so isn't safe among threads; one entry in
    and the same entry out is.
    """
    filters = cast("list[Any]", warnings.filters)
    filters.insert(0, _IGNORE_PILLOW)
    try:
        yield
    finally:
        filters.remove(_IGNORE_PILLOW)
