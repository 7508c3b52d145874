"""Laws of the Triton kernels, in Triton's interpreter on the CPU and, with the marker gpu, compiled
on a GPU.

Truth is float64 arithmetic on the same inputs. A kernel may err twice as much as torch's own
operations in that dtype, and, since the errors of a few numbers scatter, by four eps more in
float32 and by a quarter of one in 16 bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ops import (
    CASES,
    DTYPES,
    assert_errs_as_torch,
    case,
    mapped,
    poison_new_memory,
    strided,
    tensors,
)
from torch import Tensor

from flowturbo_kernels import (
    OPS,
    attention,
    final_update,
    group_norm_silu,
    guided_update,
    linear,
    linear_gated_residual,
    use_backend,
)
from flowturbo_kernels.adaln import adaln_modulate, gated_residual_adaln
from flowturbo_kernels.patch_embed import patch_embed

TRITON = [(name, i) for name, i in CASES if "triton" in OPS[name].backends]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU in this process, so its interpreter is off")
    return request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


def dtypes_of(device: str) -> list[torch.dtype]:
    """In the interpreter stores to bfloat16 truncate instead of rounding, and products of it are
    wrong.
    """
    return DTYPES if device == "cuda" else DTYPES[:2]


def check(operation: Any, args: Any, dtype: torch.dtype, any_shape: bool = False) -> None:
    with use_backend("triton"):
        results = tensors(operation(*args))
    floor = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.25)
    assert_errs_as_torch(results, operation.reference, args, floor, any_shape)


@pytest.mark.parametrize("name, index", TRITON)
def test_a_kernel_errs_as_torch_does(name, index, device):
    for dtype in dtypes_of(device):
        check(OPS[name], mapped(case(name, index, dtype, seed=11), lambda t: t.to(device)), dtype)


@pytest.mark.parametrize("layout", ["every other", "axes turned", "rows repeated"])
@pytest.mark.parametrize(
    "name, index",
    # Two sizes of each operation always, the others with the slow tests.
    [pytest.param(*case, marks=[pytest.mark.slow] if case[1] > 1 else []) for case in TRITON],
)
def test_strides_change_nothing(name, index, layout, device):
    def change(t: Tensor) -> Tensor:
        t = t.to(device)
        if layout == "every other":
            return strided(t)
        if layout == "axes turned":
            return (
                t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))
            )
        return t[:1].expand(t.shape)

    args = mapped(case(name, index, torch.float32, seed=12), change)
    plain = mapped(args, lambda t: t.clone(memory_format=torch.contiguous_format))
    with use_backend("triton"):
        for got, same in zip(tensors(OPS[name](*args)), tensors(OPS[name](*plain)), strict=True):
            assert_close(got, same, 1e-6)


@pytest.mark.parametrize("name", {name: None for name, _ in TRITON})
def test_inputs_are_left_alone(name, device):
    args = mapped(case(name, 1, torch.float32), lambda t: t.to(device))
    before = mapped(args, Tensor.clone)
    with use_backend("triton"):
        OPS[name](*args)
    assert all(torch.equal(a, b) for a, b in zip(tensors(args), tensors(before), strict=True))


# Any shape

sizes = settings(max_examples=15)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


@sizes
@given(B=st.integers(1, 3), T=st.integers(1, 9), D=st.integers(2, 300))
def test_adaln_of_any_shape(B, T, D):
    modulations = random(B, 6 * D).chunk(6, dim=1)  # strided rows, as a SiT has them
    check(adaln_modulate, (random(B, T, D) + 3, *modulations[:2]), torch.float32, any_shape=True)
    check(
        gated_residual_adaln,
        (random(B, T, D), random(B, T, D), *modulations[2:5]),
        torch.float32,
        any_shape=True,
    )


@sizes
@given(
    B=st.integers(1, 3),
    C=st.integers(1, 5),
    p=st.sampled_from([1, 2, 3, 4]),
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    data=st.data(),
)
def test_patch_embed_of_any_shape(B, C, p, h, w, data):
    D, has_v = data.draw(st.integers(1, 100)), data.draw(st.booleans())
    x, v = (random(B, C, h * p, w * p) for _ in range(2))
    check(
        patch_embed,
        (x, random(D, C * (1 + has_v), p, p), random(D), v if has_v else None),
        torch.float32,
        any_shape=True,
    )


@sizes
@given(
    N=st.integers(1, 3),
    C=st.integers(1, 5),
    H=st.integers(1, 9),
    W=st.integers(1, 9),
    data=st.data(),
)
def test_guided_update_of_any_shape(N, C, H, W, data):
    guided, base, count = (
        data.draw(st.booleans()),
        data.draw(st.booleans()),
        data.draw(st.integers(0, 4)),
    )
    R = 2 * N if guided else N
    x, raw = random(N, C, H, W), random(R, C, H, W)
    others = [random(data.draw(st.sampled_from([N, 2 * N])), C, H, W) for _ in range(count)]
    scale = data.draw(st.sampled_from([2.5, random(N, 1, 1, 1)])) if guided else None
    channels = data.draw(st.integers(1, C))
    args = (
        x,
        raw,
        scale,
        channels,
        0.3,
        random(R, C, H, W) if base else None,
        others,
        [0.1 * k - 0.2 for k in range(count)],
    )
    check(guided_update, args, torch.float32, any_shape=True)


@sizes
@given(
    N=st.integers(1, 2),
    C=st.integers(1, 4),
    p=st.sampled_from([1, 2, 3]),
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    data=st.data(),
)
def test_final_update_of_any_shape(N, C, p, h, w, data):
    """Latents need not be square: the patch is known from the number of tokens."""
    guided, base, sigma = (data.draw(st.booleans()) for _ in range(3))
    R, T, D, outputs = (
        N * (1 + guided),
        h * w,
        data.draw(st.integers(2, 200)),
        p * p * C * (1 + sigma),
    )
    layer = (
        random(R, T, D) - 2,
        random(R, D),
        random(R, D),
        random(outputs, D) / D**0.5,
        random(outputs),
    )
    args = (
        *layer,
        random(N, C, h * p, w * p),
        1.7 if guided else None,
        data.draw(st.integers(1, C)),
        0.2,
    )
    check(
        final_update,
        (*args, random(R, C, h * p, w * p)) if base else args,
        torch.float32,
        any_shape=True,
    )


@sizes
@given(
    N=st.integers(1, 2),
    groups=st.integers(1, 6),
    size=st.integers(1, 9),
    H=st.integers(1, 40),
    W=st.integers(1, 40),
)
def test_group_norm_of_any_shape(N, groups, size, H, W):
    """With a mean that is large beside the deviation, where a sum of squares would cancel."""
    assume(size * H * W > 1)  # of one number there is no deviation, and torch refuses
    x = (random(N, groups * size, H, W) + 100).to(memory_format=torch.channels_last)
    check(
        group_norm_silu,
        (x, random(groups * size), random(groups * size), groups),
        torch.float32,
        any_shape=True,
    )


@sizes
@given(
    B=st.integers(1, 3), T=st.integers(1, 40), heads=st.integers(1, 3), eighths=st.integers(1, 16)
)
def test_attention_of_any_shape(B, T, heads, eighths):
    check(attention, (random(B, T, 3, heads, 8 * eighths),), torch.float32, any_shape=True)


@sizes
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    K=st.integers(1, 100),
    N=st.integers(1, 100),
    gelu=st.booleans(),
)
def test_products_of_any_shape(B, T, K, N, gelu):
    layer = random(B, T, K), random(N, K) / K**0.5, random(N)
    check(linear, (*layer, "gelu_tanh" if gelu else None), torch.float32, any_shape=True)
    check(
        linear_gated_residual,
        (*layer, random(B, T, N), random(B, N)),
        torch.float32,
        any_shape=True,
    )


def test_a_row_far_from_zero_keeps_its_variance(device):
    """Its mean is rounded to 3e-5, however it is summed; the mean of squares less that of the mean
    would be off by 0.02.
    """
    args = (
        (torch.randn(2, 5, 1152) + 1000).to(device),
        *(torch.randn(2, 1152).to(device) for _ in range(2)),
    )
    with use_backend("triton"):
        got = adaln_modulate(*args)
    assert_close(got, adaln_modulate.reference(*mapped(args, Tensor.double)), 2e-4)
