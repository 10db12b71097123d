"""Images and texts to unit vectors, for the store and the model alike.

    encoder = load_encoder("mini")                    # or "ViT-L-14/openai", "local-dir:PATH", "hf:NAME"
    vectors = encoder.encode_images(images)           # [N, D] float32, unit rows
    grid, vectors = encoder.encode_grid(images)       # [N, P, C] patch features, and the vectors
    grid, vectors = encoder.forward_grid(pixels)      # the same from and to tensors, for a model
    vectors = encoder.encode_texts(["blue sky"])      # [N, D]
    encoder.fingerprint                               # what a vector of this encoder means

`prepare` (any thread) and the batch calls (one forward at a time) are separate, so that decoding can run
beside the model. Importing this module is cheap: torch, open_clip and timm are imported by `load_encoder`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tagstore.encoding import open_clip_models
from tagstore.encoding.torchvision_shim import prepare_torchvision
from tagstore.errors import FingerprintMismatch, InvalidInput, MissingExtra
from tagstore.types import Fingerprint, Vectors

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from PIL.Image import Image

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "bf16")

_IMAGES_A_FORWARD = {"cpu": 4, "cuda": 256}
"""Images in one forward; more gain no speed. On a CPU the activations of more do not fit its caches."""
_TEXTS_SORTED_TOGETHER = 16_384
"""Texts that are sorted by length before they are cut into batches."""


class Encoder:
    """An image tower and a text tower with one space of unit vectors.

    Made by `load_encoder`; safe to share between threads.
    """

    fingerprint: Fingerprint
    dimension: int
    """D, the length of a vector."""
    image_size: tuple[int, int]
    """(height, width) of the image tower's input."""
    device: str
    precision: str

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[list[str]], torch.Tensor],
        *,
        name: str,
        weights: Iterable[tuple[str, Any]],
        device: str,
        precision: str,
        quick_gelu: bool | None = None,
    ) -> None:
        """
        Args:
            model: an open_clip model in fp32 on the CPU.
            tokenizer: texts to token ids `[N, L]`.
            name: becomes `fingerprint.model`.
            weights: the named tensors that decide its vectors. They are hashed before any cast, so that the
                same encoder on another device or in another precision has the same fingerprint.
            quick_gelu: whether it uses QuickGELU; None to look for open_clip's module of that name.
        """
        import torch
        from open_clip.hf_model import HFTextEncoder
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from open_clip.transformer import QuickGELU

        preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
        height, width = preprocess.input_size[1:]
        self._resize = image_transform_v2(preprocess, is_train=False).transforms[
            :-2
        ]  # without ToTensor and Normalize
        self._tokenizer = tokenizer
        text_tower = getattr(model, "text", None)
        self._pad = text_tower.config.pad_token_id if isinstance(text_tower, HFTextEncoder) else None

        self.device, self.precision = device, precision
        self.image_size = (height, width)
        digest = _hash(weights)
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self._model = model.eval().requires_grad_(False).to(device=device, dtype=self._dtype)
        # pixels come as [N, H, W, 3]: convolutions are faster on a CPU when they take them as they lie
        self._model.visual.to(memory_format=torch.channels_last)
        self._mean = torch.tensor(preprocess.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(preprocess.std, device=device).view(3, 1, 1)
        self._lock = threading.Lock()
        self._batch_size = _IMAGES_A_FORWARD["cuda" if device.startswith("cuda") else "cpu"]

        self.dimension = self._forward_images(np.zeros((1, height, width, 3), np.uint8)).shape[1]
        self.fingerprint = Fingerprint(
            model=name,
            weights=digest,
            preprocess={
                "size": [height, width],
                "mode": preprocess.mode,
                "mean": [float(value) for value in preprocess.mean],
                "std": [float(value) for value in preprocess.std],
                "interpolation": preprocess.interpolation,
                "resize_mode": preprocess.resize_mode,
                "fill_color": preprocess.fill_color,
            },
            quick_gelu=any(isinstance(module, QuickGELU) for module in model.modules())
            if quick_gelu is None
            else quick_gelu,
            normalised=True,
            dimension=self.dimension,
        )
        log.info("encoder %s on %s in %s", self.fingerprint, device, precision)

    def __repr__(self) -> str:
        return f"Encoder({self.fingerprint}, device={self.device!r}, precision={self.precision!r})"

    def describe(self) -> dict[str, Any]:
        """The model, its digest and sizes, device, precision, threads and library versions, for JSON."""
        import open_clip
        import torch

        return {
            "model": self.fingerprint.model,
            "fingerprint": self.fingerprint.digest,
            "dimension": self.dimension,
            "image_size": list(self.image_size),
            "device": self.device
            if self.device == "cpu"
            else f"{self.device} ({torch.cuda.get_device_name(self.device)})",
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
        }

    def prepare(self, image: Image) -> NDArray[np.uint8]:
        """Resize and crop one image to the input of the tower, `[H, W, 3]` uint8.

        This and the batch calls together are open_clip's own evaluation transform, to the last bit for RGB
        images. Other modes are converted to RGB first (open_clip converts last, after resizing a palette by
        nearest neighbour). Safe in any thread.
        """
        value: Any = image if image.mode == "RGB" else image.convert("RGB")
        for step in self._resize:
            value = step(value)
        return np.array(value, dtype=np.uint8)

    def encode_images(self, images: Sequence[Image] | NDArray[np.uint8]) -> Vectors:
        """Unit vectors `[N, D]` float32 of images, or of a batch `[N, H, W, 3]` uint8 of prepared ones.

        Raises:
            InvalidInput: an array of another shape or dtype.
        """
        parts = [self._forward_images(batch) for batch in self._batches(images)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dimension), np.float32)

    def encode_pooled(
        self, images: Sequence[Image] | NDArray[np.uint8]
    ) -> tuple[NDArray[np.float32], Vectors]:
        """What the tower pools before its head, `[N, C]`, and unit vectors `[N, D]`, from one forward.

        The vectors are those of `encode_images`, to the last bit.

        Raises:
            InvalidInput: an array of another shape or dtype, or a tower that is not one of timm.
        """
        parts = [self._forward_pooled(batch) for batch in self._batches(images)]
        if not parts:
            return np.zeros((0, 0), np.float32), np.zeros((0, self.dimension), np.float32)
        return np.concatenate([pooled for pooled, _ in parts]), np.concatenate([v for _, v in parts])

    def encode_grid(
        self, images: Sequence[Image] | NDArray[np.uint8], *, layer: int = -1
    ) -> tuple[NDArray[np.float32], Vectors]:
        """Patch features `[N, P, C]` and unit vectors `[N, D]`, both float32, from one forward.

        Args:
            images: as for `encode_images`.
            layer: which block's output the grid is, counted from the end. -1 is what the tower itself pools
                into the vector (after its last norm), -2 the block before the last as LLaVA reads it. For
                convolutional towers blocks are stages.

        Raises:
            InvalidInput: an array of another shape or dtype, or no such layer.
        """
        if layer >= 0:
            raise InvalidInput(f"layer is counted from the end and must be negative, not {layer}")
        parts = [self._forward_grid(batch, layer) for batch in self._batches(images)]
        if not parts:
            points, channels = self._forward_grid(np.zeros((1, *self.image_size, 3), np.uint8), layer)[
                0
            ].shape[1:]
            return np.zeros((0, points, channels), np.float32), np.zeros((0, self.dimension), np.float32)
        return np.concatenate([grid for grid, _ in parts]), np.concatenate([vectors for _, vectors in parts])

    def forward_grid(self, pixels: torch.Tensor, *, layer: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        """As `encode_grid`, but from normalised pixels to tensors on the encoder's device, without gradient.

        Args:
            pixels: `[N, 3, H, W]` float.
            layer: as there.

        Returns:
            Patch features `[N, P, C]` in the encoder's precision, unit vectors `[N, D]` float32.

        Raises:
            InvalidInput: pixels of another shape, or no such layer.
        """
        import torch
        from torch.nn.functional import normalize

        if layer >= 0:
            raise InvalidInput(f"layer is counted from the end and must be negative, not {layer}")
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, *self.image_size):
            raise InvalidInput(
                f"pixels are [N, 3, {self.image_size[0]}, {self.image_size[1]}], not {list(pixels.shape)}"
            )
        pixels = pixels.to(self.device, self._dtype).contiguous(memory_format=torch.channels_last)
        parts = []
        # no_grad and not inference_mode: what comes out is input to a model that is trained
        with self._lock, torch.no_grad():
            for start in range(0, len(pixels), self._batch_size):
                parts.append(
                    open_clip_models.grid_and_vectors(
                        self._model.visual, pixels[start : start + self._batch_size], layer
                    )
                )
        if not parts:
            points, channels = self._forward_grid(np.zeros((1, *self.image_size, 3), np.uint8), layer)[
                0
            ].shape[1:]
            return pixels.new_zeros(0, points, channels), torch.zeros(0, self.dimension, device=self.device)
        return torch.cat([grid for grid, _ in parts]), normalize(
            torch.cat([vectors for _, vectors in parts]).float(), dim=-1
        )

    def grid_projection(self) -> torch.Tensor:
        """The matrix `[C, D]` (float32) from a point of the last grid to the vectors' space, without biases.

        Raises:
            InvalidInput: a tower that pools by attention has no such matrix.
        """
        return open_clip_models.grid_projection(self._model.visual).detach().float().cpu()

    def same_tower(self, tower: Any) -> bool:
        """Whether transformers' CLIPVisionModel has the weights of this encoder's tower, in any precision."""
        tower_of_encoder = getattr(self._model.visual, "tower", None)
        if tower_of_encoder is None:
            return False
        weights, other = tower_of_encoder.state_dict(), tower.state_dict()
        return weights.keys() == other.keys() and all(
            bool((weights[name].to(tensor.device, tensor.dtype) == tensor).all())
            for name, tensor in other.items()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoder:
        # an encoder never changes, so a copied model may share it
        return self

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Vectors:
        """Unit vectors `[N, D]` float32 of texts, in their order.

        Texts beyond the tower's context are cut at its end.

        Raises:
            InvalidInput: a single string, or something that is no string.
        """
        if isinstance(texts, str):
            raise InvalidInput("encode_texts takes a sequence of texts, not one text: pass [text]")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InvalidInput(f"text {i} is of type {type(text).__name__}, not a string")
        vectors = np.empty((len(texts), self.dimension), np.float32)
        for start in range(0, len(texts), _TEXTS_SORTED_TOGETHER):
            tokens = self._tokenizer(list(texts[start : start + _TEXTS_SORTED_TOGETHER]))
            # Equal lengths go together, so that a short tag is not computed at the length of the longest
            # caption.
            lengths = self._lengths(tokens)
            order = np.argsort(lengths, kind="stable")
            for i in range(0, len(order), batch_size):
                rows = order[i : i + batch_size]
                vectors[start + rows] = self._forward_tokens(tokens[rows, : lengths[rows[-1]]])
        return vectors

    def _lengths(self, tokens: torch.Tensor) -> NDArray[np.int64]:
        # open_clip's own text tower has positions for its whole context and always runs at that length.
        if self._pad is None:
            return np.full(len(tokens), tokens.shape[1])
        return np.asarray((tokens != self._pad).sum(dim=1).clamp(min=1).numpy(), np.int64)

    def _batches(self, images: Sequence[Image] | NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        size = self._batch_size
        if isinstance(images, np.ndarray):
            expected = (*self.image_size, 3)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
                raise InvalidInput(
                    f"a batch of prepared images is uint8 [N, {expected[0]}, {expected[1]}, 3], "
                    f"not {images.dtype} {list(images.shape)}: make it with Encoder.prepare"
                )
        for start in range(0, len(images), size):
            part = images[start : start + size]
            yield part if isinstance(part, np.ndarray) else np.stack([self.prepare(image) for image in part])

    def _forward_images(self, images: NDArray[np.uint8]) -> Vectors:
        with self._exclusive():
            return _unit(self._model.encode_image(self._normalised(images)))

    def _forward_pooled(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Vectors]:
        with self._exclusive():
            pooled, vectors = open_clip_models.pooled_and_vectors(
                self._model.visual, self._normalised(images)
            )
            return pooled.float().cpu().numpy(), _unit(vectors)

    def _forward_grid(self, images: NDArray[np.uint8], layer: int) -> tuple[NDArray[np.float32], Vectors]:
        with self._exclusive():
            grid, vectors = open_clip_models.grid_and_vectors(
                self._model.visual, self._normalised(images), layer
            )
            return grid.float().cpu().numpy(), _unit(vectors)

    def _forward_tokens(self, tokens: torch.Tensor) -> Vectors:
        with self._exclusive():
            return _unit(self._model.encode_text(tokens.to(self.device)))

    def _normalised(self, images: NDArray[np.uint8]) -> torch.Tensor:
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2)
        # In this order: it is what torchvision's ToTensor and Normalize compute, bit for bit.
        return pixels.float().div_(255).sub_(self._mean).div_(self._std).to(self._dtype)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Allow one forward at a time: two would compete for the cores, and take twice the memory."""
        import torch

        with self._lock, torch.inference_mode():
            yield


def load_encoder(spec: str = "mini", *, device: str = "auto", precision: str = "fp32") -> Encoder:
    """Load an encoder.

    Args:
        spec: `mini` (works offline), `NAME/TAG` (an open_clip model and one of its pretrained tags, fetched
            from a hub once), `local-dir:PATH` (a directory in open_clip's layout: `open_clip_config.json`,
            weights, tokenizer), `hf:NAME-or-PATH` (transformers' CLIPModel, from a hub or a directory in its
            layout), or `NAME/random` (that open_clip model with random weights: for tests).
        device: `auto` (CUDA where there is one, else CPU), `cpu`, `cuda`, `cuda:1`.
        precision: `fp32`, `fp16` or `bf16`. The fingerprint, and the format of stored vectors, are
            the same in all three.

    Raises:
        NotFound: no such model, tag or directory.
        InvalidInput: a spec, device or precision that means nothing, or a directory whose weights don't fit
            its config.
        Unavailable: the weights have to be fetched and the hub cannot be reached.
        MissingExtra: torch or open_clip, or the packages that `mini` lives on, are not installed.
    """
    if precision not in PRECISIONS:
        raise InvalidInput(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}")
    for package in ("torch", "open_clip"):
        if find_spec(package) is None:
            raise MissingExtra(
                f"the encoder needs the package {package}: "
                "pip install 'tagstore[server]' (or 'tagstore[model]')"
            )
    prepare_torchvision()
    device = _device(device)
    if precision == "fp16" and device == "cpu":
        raise InvalidInput("precision 'fp16' needs a GPU: on the CPU pass fp32 or bf16")
    source = open_clip_models.load(spec)
    return Encoder(
        source.model,
        source.tokenizer,
        name=spec,
        weights=source.weights,
        device=device,
        precision=precision,
        quick_gelu=source.quick_gelu,
    )


def load_encoder_of(fingerprint: Fingerprint, *, device: str = "auto") -> Encoder:
    """Load the encoder that made the vectors of a store.

    Raises what `load_encoder` does, and `FingerprintMismatch`, naming both, if what its name loads today is
    another one.
    """
    encoder = load_encoder(fingerprint.model, device=device)
    if encoder.fingerprint.digest != fingerprint.digest:
        raise FingerprintMismatch(
            f"the store was made with encoder {fingerprint}, but '{fingerprint.model}' loads as "
            f"{encoder.fingerprint} here: install the weights it was made with, or make the store anew "
            "(`tagstore reembed`, `tagstore ingest`)"
        )
    return encoder


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise InvalidInput(
            f"device '{name}' is not one that torch knows: pass auto, cpu, cuda or cuda:N"
        ) from error
    if kind not in ("cpu", "cuda"):
        raise InvalidInput(f"device '{name}' is not supported: pass auto, cpu, cuda or cuda:N")
    if kind == "cuda" and (
        not torch.cuda.is_available() or (torch.device(name).index or 0) >= torch.cuda.device_count()
    ):
        raise InvalidInput(
            f"device '{name}' is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return name


def _hash(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of names."""
    import torch

    digest = sha256()
    for name, tensor in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values: NDArray[np.uint8] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(values.data)
    return digest.hexdigest()


def _unit(vectors: torch.Tensor) -> Vectors:
    from torch.nn.functional import normalize

    return normalize(vectors.float(), dim=-1).cpu().numpy()
