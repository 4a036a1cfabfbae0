"""The triton form against the definition, interpreted; that it compiles, and where it is picked."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pertoken.core.errors import BadRequest
from pertoken.ops.selected_attention import form, naive, selected_attention
from pertoken.ops.selected_attention import torch as gathering
from pertoken.ops.selected_attention import triton as one_kernel
from tests.ops.test_selected_attention import inputs

torch.set_num_threads(1)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_compiler = pytest.mark.skipif(
    find_spec("triton") is None or "TRITON_INTERPRET" in os.environ, reason="triton is absent or set to interpret"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def interpreted():
    """The triton form in a process of its own: whether triton interprets is settled when it is imported, and torch
    imports it here."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(one_kernel.installed).result(60)
        yield lambda *args: pool.submit(one_kernel.selected_attention, *args).result(60)


def angles(chosen, dim):
    turns = torch.arange(chosen)[:, None] * (0.1 ** torch.arange(dim // 2)).repeat(2)
    return turns.cos(), turns.sin()


def poisoned(query, key, value, index, allowed, scale, bias=None, *more):
    """The same, with NaN in all keys, values and bias and places outside in all of the index that no query reads."""
    rows, kv_heads, keys, _ = key.shape
    wanted = allowed.any(3)
    read = torch.zeros(rows, index.shape[1], keys, dtype=torch.bool)
    for at in wanted.nonzero().tolist():
        read[at[0], at[1], index[tuple(at)]] = True
    key, value = (x.masked_fill(~read.expand(-1, kv_heads, -1)[..., None], torch.nan) for x in (key, value))
    index = index.masked_fill(~wanted, 2**40)
    if bias is not None:
        closed = ~(allowed if bias.shape[3] > 1 else wanted[:, :, :, None])
        bias = bias.masked_fill(closed, torch.nan)
    return query, key, value, index, allowed, scale, bias, *more


def strided(x, *order):
    """The same numbers, with axes in another order in memory and gaps between them."""
    back = sorted(range(x.dim()), key=order.__getitem__)
    wide = torch.stack([x, torch.full_like(x, True if x.dtype == torch.bool else 77)], -1)
    return wide.permute(*order, x.dim()).contiguous().permute(*back, x.dim())[..., 0]


def on_gpu(x):
    """A tensor like `x` of a GPU, which need not be there: it has no memory."""
    with FakeTensorMode():
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")


@needs_triton
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 3]),
    st.sampled_from([(1, 1), (2, 2), (2, 1), (1, 3)]),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from([1, 2, 9, 17]),
    st.integers(1, 13),
    st.booleans(),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.sampled_from([4, 6, 18]),
)
def test_it_is_the_definition(interpreted, seed, rows, heads, shared, runs, length, chosen, bias, softcap, turn, dim):
    kv_heads, each = heads
    groups = 1 if shared else kv_heads
    given_ = inputs(seed, rows, kv_heads, each, groups, runs, length, 13, chosen, dim, bias)
    turned = angles(given_[3].shape[-1], dim) if turn else None
    given_ = poisoned(*given_, softcap, turned)
    out = interpreted(*given_)
    assert torch.allclose(out, naive.selected_attention(*given_), atol=1e-5)


@needs_triton
@pytest.mark.parametrize("bias", [False, True])
def test_many_blocks_of_queries_and_keys(interpreted, bias):
    given_ = inputs(4, 1, 1, 3, 1, 2, 45, 300, 150, 4, bias)
    given_[4][:, :, :, 7:30, : one_kernel.MOST + 3] = False  # nothing in the first block, something later
    given_[4][:, :, :, 31] = False
    args = (*given_, None, angles(150, 4))
    out = interpreted(*poisoned(*args))
    assert torch.allclose(out, gathering.selected_attention(*args), atol=1e-5)
    assert not out[:, :, :, 31].any() and out[:, :, :, 30].all()


@needs_triton
def test_values_of_another_width_and_keys_turned_in_part(interpreted):
    query, key, value, index, allowed, scale, bias = inputs(5, groups=2, dim=10, bias=True)
    value = torch.cat([value, value[..., :7].sin()], -1)
    args = (query, key, value, index, allowed, scale, bias, None, angles(index.shape[-1], 6))
    assert torch.allclose(interpreted(*args), gathering.selected_attention(*args), atol=1e-5)


@needs_triton
@pytest.mark.parametrize("groups", [1, 2])
def test_any_strides(interpreted, groups):
    query, key, value, index, allowed, scale, bias = inputs(6, groups=groups, length=3, bias=True)
    cos, sin = angles(index.shape[-1], 4)
    wanted = interpreted(query, key, value, index, allowed, scale, bias, None, (cos, sin))
    key, value = strided(key, 0, 2, 1, 3), strided(value, 3, 0, 2, 1)
    query, bias = strided(query, 0, 2, 3, 1, 4), strided(bias, 4, 3, 0, 1, 2)
    index, allowed = strided(index, 3, 2, 1, 0), strided(allowed, 4, 0, 1, 2, 3)
    cos, sin = strided(cos, 1, 0), strided(sin, 0, 1)
    assert not any(x.is_contiguous() for x in (query, key, value, index, allowed, bias, cos, sin))
    assert torch.equal(interpreted(query, key, value, index, allowed, scale, bias, None, (cos, sin)), wanted)


@needs_triton
@pytest.mark.parametrize(("kind", "within"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("turn", [False, True])
def test_half_precision(interpreted, kind, within, turn):
    query, key, value, *more = inputs(8, groups=2, length=5, chosen=9, bias=True)
    args = (query.to(kind), key.to(kind), value.to(kind), *more, 3.0, angles(9, 4) if turn else None)
    out = interpreted(*poisoned(*args))
    assert out.dtype == kind
    assert torch.allclose(out.float(), naive.selected_attention(*args).float(), atol=within)


@needs_triton
def test_nothing_to_read_and_nothing_to_ask(interpreted):
    query, key, value, index, allowed, scale, _ = inputs(1)
    nothing = torch.zeros_like(allowed)
    assert torch.equal(interpreted(query, key, value, index, nothing, scale), torch.zeros_like(query))
    assert torch.equal(interpreted(query, key, value, index[..., :0], allowed[..., :0], scale), torch.zeros_like(query))
    assert interpreted(query[:, :, :0], key, value, index[:, :, :0], allowed[:, :, :0], scale).shape[2] == 0


@needs_triton
def test_what_it_does_not_take(interpreted):
    query, key, value, *more = inputs(1)
    with pytest.raises(BadRequest, match=r"float32, torch.float64; all must be one of"):
        interpreted(query, key.double(), value, *more)
    with pytest.raises(BadRequest, match="no gradients; use the op's torch form"):
        one_kernel.selected_attention(query.requires_grad_(), key, value, *more)


@needs_compiler
def test_on_a_cpu_it_says_what_to_do():
    with pytest.raises(BadRequest, match=r"queries are on cpu.*TRITON_INTERPRET=1"):
        one_kernel.selected_attention(*inputs(1))


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(one_kernel, "installed", lambda: False)
    with pytest.raises(BadRequest, match=r"triton is not installed.*pertoken\[gpu\]"):
        one_kernel.selected_attention(*inputs(1))


def test_importing_the_op_does_not_import_triton():
    code = "import sys, pertoken.ops.selected_attention as op; print('triton' in sys.modules, op.form.__name__)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "form"]


def test_it_is_picked_on_a_gpu_without_gradients(monkeypatch):
    monkeypatch.setattr(one_kernel, "installed", lambda: True)
    query, key, value, bias = (torch.zeros(2, 3) for _ in range(4))
    assert form(query, key, value, bias) is gathering.selected_attention
    moved = [on_gpu(x) for x in (query, key, value, bias)]
    assert form(*moved) is form(*moved[:3]) is one_kernel.selected_attention
    with FlopCounterMode(display=False):
        assert form(*moved) is gathering.selected_attention
    assert form(*(on_gpu(x.double()) for x in (query, key, value, bias))) is gathering.selected_attention
    for at in range(4):
        asked = [on_gpu(x).requires_grad_(at == here) for here, x in enumerate((query, key, value, bias))]
        assert form(*asked) is gathering.selected_attention
        with torch.no_grad():
            assert form(*asked) is one_kernel.selected_attention
    monkeypatch.setattr(one_kernel, "installed", lambda: False)
    assert form(*moved) is gathering.selected_attention


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "all_of_it"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_it_compiles(kind, all_of_it, tmp_path, monkeypatch):
    """For a GPU that need not be there: the interpreter takes what the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    shape = {"rows": 2, "kv_heads": 2, "each": 4, "runs": 3, "length": 9, "dim": 128, "bias": True, "groups": 2}
    alone = {"rows": 1, "kv_heads": 1, "each": 1, "runs": 1, "length": 1, "dim": 32}
    *tensors, index, allowed, scale, bias = inputs(1, **(shape if all_of_it else alone))
    tensors = [x.to(kind) for x in tensors]
    more = (5.0, angles(index.shape[-1], 128)) if all_of_it else (None, None)
    out = torch.empty_like(tensors[0])
    _, given_, constants = one_kernel.launch(out, *tensors, index, allowed, scale, bias, *more)
    attend, _ = one_kernel.kernel(on_gpu(tensors[0]))

    fixed = {(attend.arg_names.index(name),): value for name, value in {**constants, "WIDEN": False}.items()}
    signature = dict.fromkeys(attend.arg_names, "constexpr")
    for place, (name, value) in enumerate(zip(attend.arg_names, given_, strict=False)):
        signature[name] = typed(value, (place,), fixed)
    made = triton.compile(
        ASTSource(attend, signature, fixed),
        target=GPUTarget("cuda", 80, 32),
        options={"num_stages": one_kernel.stages(out, constants)},
    )
    assert made.asm["cubin"] and 0 < made.metadata.shared <= 48 * 2**10


def typed(value, place, fixed):
    """An argument's type as a launch finds it, ones and absent ones fixed."""
    kinds = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.uint8: "u8"}
    if isinstance(value, tuple):
        return tuple(typed(x, (*place, at), fixed) for at, x in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        fixed[place] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return "*" + kinds[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


@needs_gpu
@needs_compiler
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_on_a_gpu(kind, length, dim):
    query, key, value, index, allowed, scale, bias = inputs(9, 2, 2, 4, 2, 3, length, 500, 201, dim, True)
    query, key, value = (x.to(kind) for x in (query, key, value))
    for added, softcap, turned in ((None, None, None), (bias, 2.0, angles(201, dim))):
        args = (query, key, value, index, allowed, scale / dim**0.5, added, softcap, turned)
        wanted = gathering.selected_attention(*(x.float() if x is not None else x for x in args[:3]), *args[3:])
        moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in poisoned(*args)[:-1]]
        turned = None if turned is None else tuple(x.cuda() for x in turned)
        assert form(*moved[:3], moved[6]) is one_kernel.selected_attention
        out = selected_attention(*moved, turned)
        assert torch.allclose(out.cpu().float(), wanted, atol=1e-4 if kind == torch.float32 else 3e-2)
