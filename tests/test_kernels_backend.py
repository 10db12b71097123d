"""Which implementation runs, and how block sizes are chosen and kept."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

from ragged import Case, inputs
from tuna_kernels import backend, gather_tags, score_weights, tag_attention, tag_weights
from tuna_kernels.tag_attention import tuning
from tuna_kernels.tag_attention.tuning import Config


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter without the variables of this one."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def test_works_without_triton():
    code = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch
from tuna_kernels import tag_attention
q, kv, cu = torch.ones(2, 1, 16), torch.ones(1, 3, 1, 16), torch.tensor([0, 2]).int()
print(tag_attention(q, kv, kv, cu).sum().item())
try:
    tag_attention(q, kv, kv, cu, impl="triton")
except RuntimeError as error:
    print(error)
"""
    done = python(code)
    assert done.stdout.splitlines() == [
        "32.0",
        "tag_attention: impl='triton' was asked for, but the package triton is not installed: "
        "install it (it comes with torch's CUDA wheels); impl='reference' runs anywhere",
    ], done.stderr


def test_import_is_light():
    done = python("import sys, tuna_kernels; print(sorted({'triton', 'transformers'} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


def test_triton_is_never_swapped_for_something_else(monkeypatch):
    table, ids = torch.ones(3, 2), torch.tensor([0])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="on 'cpu': move them to a GPU, or set TRITON_INTERPRET=1"):
        gather_tags(table, ids, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="not float64"):
        gather_tags(table.double(), ids, impl="triton")
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        gather_tags(table.bfloat16(), ids, impl="triton")


def test_interpreter_set_too_late_is_said():
    code = """
import os, torch, triton
os.environ["TRITON_INTERPRET"] = "1"
from tuna_kernels import gather_tags
gather_tags(torch.ones(3, 2), torch.tensor([0]), impl="triton")
"""
    assert "set it in the environment of the process, before the first import" in python(code).stderr


def test_auto_says_once_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="tuna_kernels"):
        for _ in range(3):
            gather_tags(torch.ones(3, 2), torch.tensor([0]))
        gather_tags(torch.ones(3, 2).double(), torch.tensor([0]))
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    start = "gather_tags: impl='auto' uses the torch reference, because"
    assert all(message.startswith(start) for message in messages)


def test_tf32_follows_torch():
    assert backend.dot_precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert backend.dot_precision(torch.float32) == "tf32"
        assert backend.dot_precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def searching(monkeypatch, tmp_path: Path) -> list[Config]:
    """Pretend a GPU on which more warps are faster; return the configs that a search times."""
    timed: list[Config] = []
    monkeypatch.setenv("TUNA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "searching", lambda device: True)
    monkeypatch.setattr(tuning, "_device_key", lambda device: "Some-GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_time", lambda config, launch: timed.append(config) or 1 / config.warps)
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_loaded", set())
    return timed


def test_search_runs_once_and_is_kept(searching: list[Config], tmp_path: Path, monkeypatch):
    default, better = Config(16, 64, 2, 2), Config(32, 64, 4, 2)
    device = torch.device("cpu")

    def pick(key: str) -> Config:
        return tuning.pick(key, device, default, [default, better], lambda config: None)

    assert pick("a") == pick("a") == better
    assert searching == [default, better]
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"a": {"block_m": 32, "block_n": 64, "warps": 4, "stages": 2}}
    # another process: known from disk
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_loaded", set())
    assert pick("a") == better
    assert len(searching) == 2
    # a damaged file is measured anew, and mended
    file.write_text("{")
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_loaded", set())
    assert pick("a") == better
    assert len(searching) == 4
    assert "a" in json.loads(file.read_text())


def test_no_search_while_a_graph_is_captured(searching: list[Config], monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    default = Config(16, 64, 2, 2)
    assert (
        tuning.pick("b", torch.device("cpu"), default, [Config(32, 64, 4, 2)], lambda config: None) == default
    )
    assert not searching


def test_fixed_choice_on_request(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    assert tuning.searching(gpu)
    assert not tuning.searching(torch.device("cpu"))
    monkeypatch.setenv("TUNA_AUTOTUNE", "0")
    assert not tuning.searching(gpu)
    monkeypatch.delenv("TUNA_AUTOTUNE")
    torch.use_deterministic_algorithms(True)
    try:
        assert not tuning.searching(gpu)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_batch_is_not_part_of_the_key(monkeypatch):
    from tuna_kernels.tag_attention import forward

    keys = []
    monkeypatch.setattr(
        forward, "pick", lambda key, device, default, candidates, launch: keys.append(key) or default
    )
    monkeypatch.setattr(backend, "check_interpreter", lambda: None)
    for counts in ((3, 4), (3, 4, 3, 4), (30, 40)):
        grads, rest, _ = inputs(Case(counts, 9, 1, 1, 16, torch.float16, ""))
        forward.forward(*grads.values(), rest["cu_tags"], 0.25, None, None, None)
    assert keys[0] == keys[1] != keys[2]


OFFSETS = torch.tensor([0, 3, 5], dtype=torch.int32)


def weighed(coupling: str) -> Callable[..., Tensor]:
    return lambda impl, tags, images, temperature: tag_weights(
        tags, images, OFFSETS, temperature=temperature, coupling=coupling, impl=impl
    )


def operators() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Every operator, as a function of `impl` and of the inputs that it has derivatives for."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v, bias = random(5, 2, 16), random(2, 7, 2, 16), random(2, 7, 2, 16), random(5, 7)
    ids, temperature = torch.tensor([1, 4, -1]), torch.tensor(0.5)
    weighing = {f"tag_weights {c}": (weighed(c), (random(5, 16), random(2, 16), temperature))
                for c in ("multiply", "multiply_max", "log_bias")}  # fmt: skip
    return {
        "tag_attention": (
            lambda impl, q, k, v, w, b: tag_attention(q, k, v, OFFSETS, weights=w, bias=b, impl=impl),
            (q, k, v, random(5), bias),
        ),
        **weighing,
        "score_weights": (
            lambda impl, s, t: score_weights(s, OFFSETS, temperature=t, impl=impl),
            (random(5), temperature),
        ),
        "gather_tags": (lambda impl, table: gather_tags(table, ids, impl=impl), (random(9, 16),)),
    }


@pytest.mark.parametrize("name", operators())
def test_forward_mode_derivatives_are_right_in_the_reference_and_refused_by_the_kernels(name: str):
    """An operator without them would give zero without a word."""
    op, values = operators()[name]
    generator = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(x.shape, generator=generator) for x in values)
    exact, directions = [x.double() for x in values], [t.double() for t in tangents]
    _, found = torch.func.jvp(lambda *x: op("reference", *x), tuple(exact), tuple(directions))
    step = 1e-6
    ahead, back = (
        op("reference", *[x + sign * step * t for x, t in zip(exact, directions, strict=True)])
        for sign in (1, -1)
    )
    torch.testing.assert_close(found, (ahead - back) / (2 * step), atol=1e-6, rtol=1e-6)
    if backend.obstacle(values[0]) is not None:
        pytest.skip("the kernels cannot run here")
    with pytest.raises(RuntimeError, match=r"no forward-mode derivatives.*impl='reference'"):
        torch.func.jvp(lambda *x: op("triton", *x), values, tangents)
    for i, tangent in enumerate(tangents):  # any one of the inputs is enough
        with forward_ad.dual_level():
            given = [forward_ad.make_dual(x, tangent) if i == j else x for j, x in enumerate(values)]
            with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
                op("triton", *given)
            assert op("triton", *values).shape == found.shape  # without a tangent it runs


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
@pytest.mark.parametrize("name", operators())
def test_tensors_without_values_give_shapes(name: str, impl: str):
    op, values = operators()[name]
    if impl == "triton" and backend.obstacle(values[0]) is not None:
        pytest.skip("the kernels cannot run here")
    real = op(impl, *values)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = op(impl, *[mode.from_tensor(x) for x in values])
    assert isinstance(fake, FakeTensor)
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


def test_offsets_without_values_are_taken_too():
    with FakeTensorMode() as mode:
        q, k = torch.empty(5, 2, 16), torch.empty(2, 7, 2, 16)
        assert tag_attention(q, k, k, mode.from_tensor(OFFSETS), impl="reference").shape == (5, 2, 16)
        ids = torch.empty(3, dtype=torch.int64)
        assert gather_tags(torch.empty(9, 16), ids, impl="reference").shape == (3, 16)


def test_the_float16_reference_scales_before_it_multiplies():
    """The products alone would be beyond float16, of which the largest number is 65,504."""
    q = torch.full((2, 1, 64), 60.0)
    q[1] = 1.0
    k = torch.full((1, 3, 1, 64), 60.0) * torch.tensor([1.0, 0.999, -1.0]).view(1, 3, 1, 1)
    v = torch.randn(1, 3, 1, 64, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    assert (q[0, 0] @ k[0, 0, 0]) > torch.finfo(torch.float16).max
    half = tag_attention(q.half(), k.half(), v.half(), offsets, impl="reference")
    single = tag_attention(q.half().float(), k.half().float(), v.half().float(), offsets, impl="reference")
    assert torch.isfinite(half).all()
    torch.testing.assert_close(half.float(), single, atol=2e-3, rtol=2e-3)
