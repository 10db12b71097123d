"""TUNA inside another engine: what is computed is tuna_model's own, and vLLM's wheel has every name used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch

from tagstore.errors import InvalidInput
from tuna import features, rows, small, tags
from tuna_model.engines.picture_blocks import embed_block, pack, picture_block, tags_from, unpack

ENGINES = Path(__file__).parents[1] / "tuna_model" / "engines"
LLAVA_METHODS = (
    "__init__", "get_placeholder_str", "embed_multimodal", "forward", "compute_logits", "load_weights",
)  # fmt: skip
"""Methods whose signatures are those of vLLM's Llava: their bases are protocols that say less."""
PLUGIN = [ENGINES / "vllm.py", ENGINES / "vllm_model.py"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tag_place": "after", "tag_coupling": "multiply"},
        {"tag_encoder_layers": 0},
        {"tag_queries": "token"},
        {"connector": "pooled", "pool_side": 2},
    ],
)
@torch.no_grad()
def test_blocks_hold_the_embeddings_that_the_whole_model_computes(fields: dict):
    model, processor = small(**fields)
    given = [tags(3), None, tags(2, seed=1)]
    pictures = features(3)
    batch = processor(text="A <image> and <image> or <image>?", tags=given)
    whole: list[torch.Tensor] = []
    model.language_model.register_forward_pre_hook(
        lambda *call: whole.append(call[2]["inputs_embeds"]), with_kwargs=True
    )
    model(**batch, **pictures)
    blocks = unpack(pack([picture_block(processor, each) for each in given], model.config), model.config)
    embedded = [
        embed_block(model, block, **rows(pictures, slice(i, i + 1))) for i, block in enumerate(blocks)
    ]
    ids, place = batch["input_ids"][0].tolist(), 0
    for block, embeddings in zip(blocks, embedded, strict=True):
        length = len(block.input_ids)
        place = next(i for i in range(place, len(ids)) if ids[i : i + length] == block.input_ids)
        torch.testing.assert_close(embeddings, whole[0][0, place : place + length], rtol=0, atol=2e-6)
        place += length


@torch.no_grad()
def test_without_tags_a_picture_is_stock_llavas_tokens():
    model, processor = small()
    block = picture_block(processor)
    assert block.input_ids == [processor.image_token_id] * model.config.image_tokens
    assert not block.tag_inputs
    picture = features(1)
    assert torch.equal(embed_block(model, block, **picture), model.multi_modal_projector(picture["grid"])[0])


def test_tags_of_a_request_are_those_of_the_library():
    ours = tags(3)
    names = ("similarity", "vote_share", "relevance")
    request = {
        "texts": list(ours.texts),
        "embeddings": ours.embeddings.tolist(),
        **{name: getattr(ours, name).tolist() for name in names},
    }
    read = tags_from(request)
    assert read is not None
    assert read.texts == ours.texts
    assert all(np.array_equal(getattr(read, name), getattr(ours, name)) for name in ("embeddings", *names))
    assert tags_from(None) is None
    with pytest.raises(InvalidInput, match="vote_share"):
        tags_from({name: value for name, value in request.items() if name != "vote_share"})
    with pytest.raises(InvalidInput, match="3 tags need"):
        tags_from(request | {"relevance": [1.0]})


def test_a_coupling_that_biases_attention_is_refused():
    model, processor = small(tag_coupling="log_bias")
    with pytest.raises(InvalidInput, match="tuna serve"):
        embed_block(model, picture_block(processor, tags(2)), **features(1))


def test_nothing_of_the_plugin_is_imported_with_tuna_model():
    code = "import sys, tuna_model; print([m for m in sys.modules if 'engines' in m or m.startswith('vllm')])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


# the wheel


@pytest.fixture(scope="module")
def wheel() -> Path:
    """TUNA_VLLM: the folder that vLLM's wheel was unpacked into."""
    if "TUNA_VLLM" not in os.environ:
        pytest.skip("set TUNA_VLLM to the folder of an unpacked wheel of vLLM")
    return Path(os.environ["TUNA_VLLM"])


def source(wheel: Path, module: str) -> ast.Module | None:
    path = wheel.joinpath(*module.split("."))
    file = next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)
    return None if file is None else ast.parse(file.read_text())


def definition(wheel: Path, module: str, name: str) -> tuple[str, ast.AST] | None:
    """Where a module's name is defined, followed through imports and lazy tables."""
    tree = source(wheel, module)
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name and node in tree.body:
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign) and node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, node
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            package = source(wheel, module) and wheel.joinpath(*module.split("."), "__init__.py").is_file()
            base = module.split(".")[: None if package else -1]
            base = base[: len(base) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            if (found := definition(wheel, target, original)) is not None:
                return found
    return None


def methods(wheel: Path, module: str, name: str) -> dict[str, ast.FunctionDef]:
    """Methods of a class and its bases inside vLLM; the class's own come last and win."""
    found = definition(wheel, module, name)
    if found is None or not isinstance(found[1], ast.ClassDef):
        return {}
    of: dict[str, ast.FunctionDef] = {}
    for base in found[1].bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(base, ast.Name):
            of |= methods(wheel, found[0], base.id)
    return of | {node.name: node for node in found[1].body if isinstance(node, ast.FunctionDef)}


def arguments(function: ast.FunctionDef) -> list[str]:
    of = function.args
    return (
        [a.arg for a in (*of.posonlyargs, *of.args)]
        + ["*"] * bool(of.kwonlyargs)
        + [a.arg for a in of.kwonlyargs]
    )


def vllm_imports() -> dict[str, str]:
    return {
        alias.name: node.module or ""
        for path in PLUGIN
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }


@pytest.mark.matrix
def test_every_name_that_we_import_from_vllm_exists(wheel: Path):
    names = vllm_imports()
    assert len(names) > 8
    missing = [f"{module}.{name}" for name, module in names.items() if not definition(wheel, module, name)]
    # vllm/__init__.py names its own lazily, in a table of strings
    lazy = (wheel / "vllm" / "__init__.py").read_text()
    assert [name for name in missing if f'"{name.rpartition(".")[2]}"' not in lazy] == []


@pytest.mark.matrix
def test_every_method_that_we_override_has_the_signature_of_its_base(wheel: Path):
    imports, checked = vllm_imports(), []
    for ours in ast.walk(ast.parse(PLUGIN[1].read_text())):
        if not isinstance(ours, ast.ClassDef):
            continue
        bases: dict[str, ast.FunctionDef] = {}
        for base in ours.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(name, ast.Name) and name.id in imports:
                bases |= methods(wheel, imports[name.id], name.id)
        for method in ours.body:
            if (
                isinstance(method, ast.FunctionDef)
                and method.name in bases
                and method.name not in LLAVA_METHODS
            ):
                assert arguments(method) == arguments(bases[method.name]), f"{ours.name}.{method.name}"
                checked.append(method.name)
        if ours.name == "TunaMultiModalProcessor":  # what it must have and what it uses
            assert {"_call_hf_processor", "_get_cache_missing_processor_kwargs"} <= {*checked}
    llava = methods(wheel, "vllm.model_executor.models.llava", "LlavaForConditionalGeneration")
    model = next(
        node
        for node in ast.parse(PLUGIN[1].read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "TunaForConditionalGeneration"
    )
    own = {node.name: node for node in model.body if isinstance(node, ast.FunctionDef)}
    for name in LLAVA_METHODS:
        assert arguments(own[name]) == arguments(llava[name]), name
    assert {"_mark_tower_model", "_mark_language_model"} <= llava.keys()


@pytest.mark.matrix
def test_the_plugin_group_is_vllms(wheel: Path):
    (plugin,) = [each for each in entry_points(group="vllm.general_plugins") if each.name == "tuna"] or [None]
    if plugin is not None:  # a checkout that is not installed anew has none
        assert plugin.value == "tuna_model.engines.vllm:register"
    assert '"vllm.general_plugins"' in (wheel / "vllm" / "plugins" / "__init__.py").read_text()
