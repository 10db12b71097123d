"""Pictures to pixels for the image tower: open_clip's own evaluation transform, as the store's encoder uses
it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from tagstore.errors import InvalidInput, NotFound


class TunaImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Resizes, crops and normalises as a fingerprint's `preprocess` says. Saved as
    preprocessor_config.json."""

    model_input_names = ["pixel_values"]  # noqa: RUF012  transformers reads it as a list

    def __init__(
        self,
        size: Any = (224, 224),
        mode: str = "RGB",
        mean: Any = (0.5, 0.5, 0.5),
        std: Any = (0.5, 0.5, 0.5),
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        fill_color: int = 0,
        **kwargs: Any,
    ) -> None:
        """Takes the fields of `Fingerprint.preprocess`; `kwargs` are what transformers stores beside them."""
        super().__init__(**kwargs)
        self.size, self.mode, self.mean, self.std = list(size), mode, list(mean), list(std)
        self.interpolation, self.resize_mode, self.fill_color = interpolation, resize_mode, fill_color

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; translates the dict of a CLIP image processor first."""
        if "image_mean" in image_processor_dict:
            from tagstore.encoding.hf_models import clip_preprocess

            image_processor_dict = clip_preprocess(image_processor_dict)
        return super().from_dict(image_processor_dict, **kwargs)

    def __call__(self, images: Any, return_tensors: str = "pt", **kwargs: Any) -> BatchFeature:
        """Compute `pixel_values` `[N, 3, H, W]` float32 of one picture or a list of them.

        Args:
            images: PIL images, encoded bytes, paths, or uint8 arrays `[H, W, 3]`.

        Raises:
            NotFound: there is no such file.
            BadImage: the bytes are no image.
            InvalidInput: an object that is no picture, or an unknown argument.
        """
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)

    def preprocess(self, images: Any, return_tensors: str = "pt", **unknown: Any) -> BatchFeature:
        """As a call: the name that transformers uses."""
        refuse_unknown("TunaImageProcessor", unknown)
        pictures = images if isinstance(images, list | tuple) else [images]
        rows = [torch.from_numpy(self._prepare(upright(picture))) for picture in pictures]
        if not rows:
            return BatchFeature({"pixel_values": torch.zeros(0, 3, *self.size)}, tensor_type=return_tensors)
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        # in this order, and in float32: the encoder's own arithmetic (`Encoder._normalised`), bit for bit
        pixels = torch.stack(rows).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _prepare(self, picture: Any) -> np.ndarray[Any, Any]:
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        for transform in self._transforms():
            picture = transform(picture)
        return np.array(picture, dtype=np.uint8)

    def _transforms(self) -> Any:
        """Open_clip's resizing and cropping, without its conversion to normalised tensors."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        size, mean, std = tuple(self.size), tuple(self.mean), tuple(self.std)
        config = PreprocessCfg(
            size, self.mode, mean, std, self.interpolation, self.resize_mode, self.fill_color
        )
        return image_transform_v2(config, is_train=False).transforms[:-2]


def refuse_unknown(name: str, arguments: dict[str, Any]) -> None:
    """Refuse arguments that would have no effect; None asks for none. Raises `InvalidInput`."""
    given = sorted(key for key, value in arguments.items() if value is not None)
    if given:
        raise InvalidInput(f"{name} has no argument {', '.join(given)}: leave it out")


def upright(picture: Any) -> Any:
    """Open a picture (PIL image, encoded bytes, path or array) as a PIL image, decoded as the store
    decodes."""
    from PIL import Image

    from tagstore.encoding.images import decode

    if isinstance(picture, str | os.PathLike):
        try:
            picture = Path(picture).read_bytes()
        except OSError as error:
            raise NotFound(f"cannot read image {os.fspath(picture)}: {error.strerror}") from error
    if isinstance(picture, bytes):
        return decode(picture)
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2:] == (3,):
        return Image.fromarray(picture)
    raise InvalidInput(
        "a picture is a path, encoded bytes, a PIL image or a uint8 array [H, W, 3], "
        f"not {type(picture).__name__}"
    )
