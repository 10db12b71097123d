"""`gather_tags`: table[ids], and a gradient that is the same sum in the same order every time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragged import DEVICE, dtypes, in_float64, with_gradients
from rounding import assert_rounds, gathering, rounding_errors
from tuna_kernels import gather_tags

triton, reference = partial(gather_tags, impl="triton"), partial(gather_tags, impl="reference")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(-1, 11), max_size=30),
    columns=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    wide=st.booleans(),
)
def test_kernel_against_reference(ids: list[int], columns: int, dtype: torch.dtype, wide: bool):
    generator = torch.Generator().manual_seed(len(ids))
    table = torch.randn(12, columns, generator=generator).to(DEVICE, dtype)
    dout = torch.randn(len(ids), columns, generator=generator).to(DEVICE, dtype)
    rest = {"ids": torch.tensor(ids, dtype=torch.int64 if wide else torch.int32, device=DEVICE)}
    kernel, plain = (with_gradients(op, {"table": table}, rest, dout) for op in (triton, reference))
    assert torch.equal(kernel["out"], plain["out"])
    assert dtypes(kernel) == dtypes(plain)
    exact = with_gradients(reference, in_float64({"table": table}), rest, dout.double())
    assert_rounds(kernel, exact, rounding_errors(gathering, dtype, table=table, **rest, dout=dout))


def test_it_is_indexing_with_holes():
    table = torch.arange(12.0, device=DEVICE).view(4, 3).requires_grad_()
    ids = torch.tensor([2, -1, 0, 2], device=DEVICE)
    for op in (triton, reference):
        out = op(table, ids)
        assert out.tolist() == [[6, 7, 8], [0, 0, 0], [0, 1, 2], [6, 7, 8]]
        (grad,) = torch.autograd.grad(out, table, torch.ones_like(out))
        assert grad[:, 0].tolist() == [1, 0, 2, 0]


def test_reference_gradients():
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference(x, torch.tensor([1, 1, -1, 4])), (table,))


def test_many_of_one_id_are_summed_in_float32():
    """Halves added one by one to 1024 in float16 would leave it as it is."""
    table = torch.zeros(2, 4, dtype=torch.float16, device=DEVICE, requires_grad=True)
    ids = torch.ones(65, dtype=torch.int64, device=DEVICE)
    dout = torch.full((65, 4), 0.5, dtype=torch.float16, device=DEVICE)
    dout[0] = 1024
    (grad,) = torch.autograd.grad(triton(table, ids), table, dout)
    assert grad[1].tolist() == [1056.0] * 4
    assert not grad[0].any()


def test_an_id_beyond_the_table():
    from tuna_kernels.gather_tags.kernels import gather

    table = torch.ones(3, 4)
    with pytest.raises(IndexError, match="id 3 is beyond the table's 3 rows"):
        gather_tags(table, torch.tensor([0, 3]))
    # on a GPU no check is free: the row says so
    out = gather(table.to(DEVICE), torch.tensor([0, 3], device=DEVICE))
    assert not out[0].isnan().any()
    assert out[1].isnan().all()


def test_torch_library_rules():
    table = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(
        torch.ops.tuna_kernels.gather_tags_forward.default,
        (table, torch.tensor([1, 1, 4, -1], device=DEVICE)),
    )


def test_torch_compile_takes_it_whole():
    torch._dynamo.reset()
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager", dynamic=True)
    table = torch.randn(5, 8, device=DEVICE)
    for ids in ([1, 1, 4], [0, 2, 2, 3, 3]):
        rest, dout = {"ids": torch.tensor(ids, device=DEVICE)}, torch.ones(len(ids), 8, device=DEVICE)
        ours, plain = (with_gradients(op, {"table": table}, rest, dout) for op in (compiled, triton))
        assert all(torch.equal(x, ours[name]) for name, x in plain.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_table_in_host_memory():
    table = torch.randn(100, 16, requires_grad=True)
    ids = torch.tensor([3, 3, 99, -1], device="cuda")
    out = gather_tags(table, ids)
    assert torch.equal(out.cpu(), reference(table, ids.cpu()))
    (grad,) = torch.autograd.grad(out, table, torch.ones_like(out))
    assert grad[3].tolist() == [2.0] * 16


@pytest.mark.parametrize(
    ("table", "ids"),
    [
        (torch.ones(3), torch.tensor([0])),
        (torch.ones(3, 2), torch.tensor([0.0])),
        (torch.ones(3, 2), torch.tensor([[0]])),
    ],
    ids=["table", "dtype", "shape"],
)
def test_refusals(table: torch.Tensor, ids: torch.Tensor):
    with pytest.raises(ValueError, match=r"expected table \[V, E\] and int32 or int64 ids \[T\]"):
        gather_tags(table, ids)
