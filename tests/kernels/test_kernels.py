"""Laws of every operation: it means its formula, errs little in every dtype, reads strides, and
refuses what does not fit.
"""

import math
from typing import Any

import pytest
import torch
from close import assert_close, relative_error
from ops import CASES, DTYPES, NAMES, case, examples, mapped, strided, tensors
from torch import Tensor

from flowturbo_kernels import (
    OPS,
    adaln_modulate,
    attention,
    final_update,
    gated_residual_adaln,
    group_norm_silu,
    guide,
    guided_update,
    linear,
    linear_gated_residual,
    patch_embed,
    velocity_update,
)

# What each operation means, written out in its formula.


def long_adaln(x, shift, scale, eps=1e-6):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + eps) ** 0.5 * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def long_seam(x, y, gate, shift, scale, eps=1e-6):
    total = torch.stack([x[b] + gate[b] * y[b] for b in range(len(x))])
    return total, long_adaln(total, shift, scale, eps)


def long_attention(qkv):
    B, T, _, heads, head_dim = qkv.shape
    out = torch.empty(B, T, heads * head_dim, dtype=qkv.dtype)
    for b in range(B):
        for h in range(heads):
            q, k, v = (qkv[b, :, j, h] for j in range(3))
            scores = (q @ k.T / math.sqrt(head_dim)).exp()
            out[b, :, h * head_dim : (h + 1) * head_dim] = scores @ v / scores.sum(1, keepdim=True)
    return out


def long_linear(x, weight, bias, activation=None):
    y = torch.einsum("...k,nk->...n", x, weight) + bias
    if activation is None:
        return y
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def long_patch_embed(x, weight, bias, v=None, positions=None):
    both = (
        x if v is None else torch.stack([torch.cat([x[b % len(x)], v[b]]) for b in range(len(v))])
    )
    p = weight.shape[-1]
    patches = [
        both[:, :, row : row + p, column : column + p].reshape(len(both), -1)
        for row in range(0, x.shape[2], p)
        for column in range(0, x.shape[3], p)
    ]
    tokens = torch.stack(patches, 1) @ weight.reshape(len(weight), -1).T + bias
    return tokens if positions is None else tokens + positions


def long_velocity_update(x, velocities, weights):
    out = x.clone()
    for n in range(len(x)):
        for v, weight in zip(velocities, weights, strict=True):
            out[n] += weight * v[n]
    return out


def long_guide(v, scale, channels):
    out, N = v.clone(), len(v) // 2
    for n in range(N):
        s = scale if isinstance(scale, float) else float(scale[n])
        for c in range(channels):
            out[n, c] = out[N + n, c] = v[N + n, c] + s * (v[n, c] - v[N + n, c])
    return out


def long_guided_update(x, raw, scale, channels, weight, base=None, velocities=(), weights=()):
    v = raw if scale is None else long_guide(raw, scale, channels)
    v = v if base is None else v + base
    return long_velocity_update(x, [v, *velocities], [weight, *weights]), v


def long_final_update(tokens, shift, scale, weight, bias, x, guidance, channels, weight_v, *rest):
    h = long_adaln(tokens, shift, scale)
    C, H, W = x.shape[1:]
    p = math.isqrt(H * W // tokens.shape[1])
    outputs = len(weight) // p**2
    raw = x.new_zeros(len(tokens), C, H, W)
    for token in range(tokens.shape[1]):
        top, left = token // (W // p) * p, token % (W // p) * p
        for i in range(p):
            for j in range(p):
                for c in range(C):
                    row = (i * p + j) * outputs + c
                    raw[:, c, top + i, left + j] = h[:, token] @ weight[row] + bias[row]
    return long_guided_update(x, raw, guidance, channels, weight_v, *rest)


def long_group_norm_silu(x, weight, bias, groups, eps=1e-6):
    out = torch.empty_like(x)
    size = x.shape[1] // groups
    for n in range(len(x)):
        for g in range(groups):
            part = x[n, g * size : (g + 1) * size]
            normal = (part - part.mean()) / (((part - part.mean()) ** 2).mean() + eps) ** 0.5
            y = (
                normal * weight[g * size : (g + 1) * size, None, None]
                + bias[g * size : (g + 1) * size, None, None]
            )
            out[n, g * size : (g + 1) * size] = y / (1 + (-y).exp())
    return out


def long_linear_gated_residual(x, weight, bias, residual, gate):
    y = long_linear(x, weight, bias)
    return torch.stack([residual[b] + gate[b] * y[b] for b in range(len(x))])


MEANING = {
    "adaln_modulate": long_adaln,
    "gated_residual_adaln": long_seam,
    "attention": long_attention,
    "linear": long_linear,
    "linear_gated_residual": long_linear_gated_residual,
    "patch_embed": long_patch_embed,
    "velocity_update": long_velocity_update,
    "guide": long_guide,
    "guided_update": long_guided_update,
    "final_update": long_final_update,
    "group_norm_silu": long_group_norm_silu,
}


def test_the_registry_names_its_operations():
    for name, operation in OPS.items():
        assert operation.name == name == operation.reference.__name__
        assert repr(operation) == f"<op {name}>"
        assert operation.__doc__
        assert operation.__doc__ == operation.reference.__doc__


def test_examples_hold_what_kernels_get_wrong():
    """head_dim 72, which is no power of two; token counts that divide by nothing; a batch of
    one.
    """
    shapes = [args[0].shape for args in examples("attention", torch.float32)]
    assert {s[4] for s in shapes} >= {72}
    assert any(s[1] % 2 for s in shapes)
    assert any(s[0] == 1 for s in shapes)
    assert any(args[0].shape[1] == 7 for args in examples("adaln_modulate", torch.float32))
    assert any(args[3] is not None for args in examples("patch_embed", torch.float32))
    assert any(isinstance(args[1], Tensor) for args in examples("guide", torch.float32))


@pytest.mark.parametrize("name, index", CASES)
def test_an_operation_means_its_formula(name, index):
    """Two ways of writing the same float64 arithmetic agree to its rounding."""
    args = case(name, index, torch.float64, seed=1)
    for got, truth in zip(tensors(OPS[name](*args)), tensors(MEANING[name](*args)), strict=True):
        assert got.dtype == torch.float64
        assert_close(got, truth, 1e-13)


# Rounding inputs is not an operation's error: truth is float64 arithmetic on the rounded inputs. In
# float16 and bfloat16 a result that is right but for its own rounding errs by a quarter of eps,
# measured; one more rounding on the way makes that a half. In float32 sums of 1152 terms round at
# every term: 3.6 eps were measured.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, index", CASES)
def test_error_against_float64(name, index, dtype):
    args = case(name, index, dtype, seed=2)
    truths = tensors(OPS[name].reference(*mapped(args, lambda t: t.double())))
    bound = (8 if dtype == torch.float32 else 0.75) * torch.finfo(dtype).eps
    for got, truth in zip(tensors(OPS[name](*args)), truths, strict=True):
        assert got.dtype == dtype
        assert_close(got, truth, bound)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual_adaln", "velocity_update"])
def test_operations_that_widen_round_once(name, dtype):
    """In 16 bits they give what float32 gives on the same inputs, rounded."""
    for args in examples(name, dtype, seed=7):
        widened = tensors(OPS[name](*mapped(args, Tensor.float)))
        assert all(
            torch.equal(got, w.to(dtype))
            for got, w in zip(tensors(OPS[name](*args)), widened, strict=True)
        )


@pytest.mark.parametrize("layout", ["every other", "axes turned", "rows repeated"])
@pytest.mark.parametrize("name, index", CASES)
def test_strides_change_nothing(name, index, layout):
    """To rounding: a matrix product may sum in another order for another layout."""
    args = case(name, index, torch.float64, seed=3)

    def change(t: Tensor) -> Tensor:
        if layout == "every other":
            return strided(t)
        if layout == "axes turned":
            return (
                t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))
            )
        return t[:1].expand(t.shape)

    changed = mapped(args, change)
    plain = mapped(changed, lambda t: t.clone(memory_format=torch.contiguous_format))
    assert all(t.is_contiguous() for t in tensors(plain))
    for got, truth in zip(tensors(OPS[name](*changed)), tensors(OPS[name](*plain)), strict=True):
        assert_close(got, truth, 1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_alone(name):
    args = case(name, 1, torch.float32)
    before = mapped(args, Tensor.clone)
    OPS[name](*args)
    assert all(torch.equal(a, b) for a, b in zip(tensors(args), tensors(before), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_formula(name):
    """By every tensor argument, against the formula's own, along a random direction of the
    results.
    """
    mine, theirs = (
        mapped(case(name, 1, torch.float64, seed=4), lambda t: t.clone().requires_grad_())
        for _ in range(2)
    )
    results, truths = tensors(OPS[name](*mine)), tensors(MEANING[name](*theirs))
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in truths]
    got = torch.autograd.grad(results, tensors(mine), directions)
    expected = torch.autograd.grad(truths, tensors(theirs), directions)
    for g, e in zip(got, expected, strict=True):
        assert float(e.norm()) > 0
        assert_close(g, e, 1e-12)


def test_attention_of_one_token_is_its_value():
    qkv = torch.randn(3, 1, 3, 2, 72, dtype=torch.float64)
    assert torch.allclose(attention(qkv), qkv[:, :, 2].flatten(2), rtol=1e-14, atol=0)


def test_attention_does_not_overflow():
    qkv = torch.randn(1, 7, 3, 1, 72) * 1e3
    assert attention(qkv).isfinite().all()


def test_seam_modulates_the_sum_before_it_is_rounded():
    x, y, gate, shift, scale = case("gated_residual_adaln", 3, torch.bfloat16, seed=6)
    total, modulated = gated_residual_adaln(x, y, gate, shift, scale)
    exact = long_seam(*(t.double() for t in (x, y, gate, shift, scale)))[1]
    again = adaln_modulate(total, shift, scale)
    assert_close(modulated, exact, 0.8 * relative_error(again, exact))


def test_velocity_update_reads_the_first_rows_only():
    x, v = torch.randn(2, 3, 4), torch.full((4, 3, 4), math.nan)
    v[:2] = 1.0
    assert torch.allclose(velocity_update(x, [v], [0.25]), x + 0.25)


def test_guidance_of_one_and_zero():
    """Scale 1 is the conditional half, scale 0 the unconditional, in both halves, for the guided
    channels.
    """
    v = torch.randn(4, 4, 5, 7, dtype=torch.float64)
    c, u = v.chunk(2)
    assert torch.allclose(guide(v, 1.0, 3)[:, :3], torch.cat([c, c])[:, :3], atol=1e-15)
    assert torch.equal(guide(v, 0.0, 4), torch.cat([u, u]))
    assert torch.equal(guide(v, 7.0, 3)[:, 3], v[:, 3])


def r(*shape: int) -> Tensor:
    return torch.zeros(shape)


# (operation, arguments, error, the argument that the message must name)
REFUSED: list[tuple[Any, tuple[Any, ...], type[Exception], str]] = [
    (adaln_modulate, (r(2, 3), r(2, 3), r(2, 3)), ValueError, "x"),
    (adaln_modulate, (r(2, 3, 8), r(2, 7), r(2, 8)), ValueError, "shift"),
    (adaln_modulate, (r(2, 3, 8), r(2, 8), r(1, 8)), ValueError, "scale"),
    (adaln_modulate, (r(2, 3, 8), r(2, 1, 8), r(2, 8)), ValueError, "shift"),
    (adaln_modulate, (r(2, 3, 8).long(), r(2, 8), r(2, 8)), TypeError, "x"),
    (adaln_modulate, (r(2, 3, 8), r(2, 8).int(), r(2, 8)), TypeError, "shift"),
    (adaln_modulate, (r(2, 3, 8), r(2, 8).to("meta"), r(2, 8)), ValueError, "shift"),
    (gated_residual_adaln, (r(2, 3, 8, 1), r(2, 3, 8), r(2, 8), r(2, 8), r(2, 8)), ValueError, "x"),
    (gated_residual_adaln, (r(2, 3, 8), r(2, 4, 8), r(2, 8), r(2, 8), r(2, 8)), ValueError, "y"),
    (gated_residual_adaln, (r(2, 3, 8), r(2, 3, 8), r(3, 8), r(2, 8), r(2, 8)), ValueError, "gate"),
    (gated_residual_adaln, (r(2, 3, 8), r(2, 3, 8), r(2, 8), r(8), r(2, 8)), ValueError, "shift"),
    (
        gated_residual_adaln,
        (r(2, 3, 8), r(2, 3, 8), r(2, 8), r(2, 8), r(2, 9)),
        ValueError,
        "scale",
    ),
    (
        gated_residual_adaln,
        (r(2, 3, 8), r(2, 3, 8).bool(), r(2, 8), r(2, 8), r(2, 8)),
        TypeError,
        "y",
    ),
    (attention, (r(2, 7, 3, 8),), ValueError, "qkv"),
    (attention, (r(2, 7, 2, 1, 8),), ValueError, "qkv"),
    (attention, (r(2, 7, 3, 1, 8).long(),), TypeError, "qkv"),
    (linear, (r(2, 8), r(4, 7), r(4)), ValueError, "weight"),
    (linear, (r(2, 8), r(8), r(4)), ValueError, "weight"),
    (linear, (r(2, 8), r(4, 8), r(5)), ValueError, "bias"),
    (linear, (r(), r(4, 8), r(4)), ValueError, "x"),
    (linear, (r(2, 8).long(), r(4, 8), r(4)), TypeError, "x"),
    (linear, (r(2, 8), r(4, 8), r(4), "gelu"), ValueError, "activation"),
    (patch_embed, (r(4, 8, 8), r(16, 4, 2, 2), r(16)), ValueError, "x"),
    (patch_embed, (r(1, 4, 8, 8), r(16, 3, 2, 2), r(16)), ValueError, "weight"),
    (patch_embed, (r(1, 4, 8, 8), r(16, 4, 2, 4), r(16)), ValueError, "weight"),
    (patch_embed, (r(1, 4, 8, 8), r(16, 4), r(16)), ValueError, "weight"),
    (patch_embed, (r(1, 4, 8, 8), r(16, 4, 2, 2), r(15)), ValueError, "bias"),
    (patch_embed, (r(1, 4, 8, 7), r(16, 4, 2, 2), r(16)), ValueError, "x"),
    (patch_embed, (r(1, 4, 8, 8), r(16, 4, 2, 2), r(16), r(1, 4, 8, 8)), ValueError, "weight"),
    (patch_embed, (r(2, 4, 8, 8), r(16, 8, 2, 2), r(16), r(3, 4, 8, 8)), ValueError, "v"),
    (patch_embed, (r(1, 4, 8, 8), r(16, 8, 2, 2), r(16), r(1, 4, 8, 4)), ValueError, "v"),
    (patch_embed, (r(1, 4, 8, 8), r(16, 4, 2, 2), r(16), None, r(15, 16)), ValueError, "positions"),
    (
        patch_embed,
        (r(1, 4, 8, 8), r(16, 4, 2, 2), r(16), None, r(16, 16).int()),
        TypeError,
        "positions",
    ),
    (patch_embed, (r(1, 4, 8, 8), r(16, 8, 2, 2), r(16), r(1, 4, 8, 8).int()), TypeError, "v"),
    (velocity_update, (r(2, 3), [], []), ValueError, "velocities"),
    (velocity_update, (r(2, 3), [r(2, 3)], [0.1, 0.2]), ValueError, "weights"),
    (velocity_update, (r(2, 3), [r(2, 3), r(1, 3)], [0.1, 0.2]), ValueError, "velocities[1]"),
    (velocity_update, (r(2, 3), [r(2, 4)], [0.1]), ValueError, "velocities[0]"),
    (velocity_update, (r(2, 3), [r(2, 3).long()], [0.1]), TypeError, "velocities[0]"),
    (guide, (r(3, 4, 8, 8), 2.0, 3), ValueError, "v"),
    (guide, (r(4, 8, 8), 2.0, 3), ValueError, "v"),
    (guide, (r(4, 4, 8, 8), 2.0, 5), ValueError, "channels"),
    (guide, (r(4, 4, 8, 8), 2.0, 0), ValueError, "channels"),
    (guide, (r(4, 4, 8, 8), r(4, 1, 1, 1), 3), ValueError, "scale"),
    (guide, (r(4, 4, 8, 8).long(), 2.0, 3), TypeError, "v"),
    (linear_gated_residual, (r(2, 3, 8), r(4, 7), r(4), r(2, 3, 4), r(2, 4)), ValueError, "weight"),
    (linear_gated_residual, (r(2, 3, 8), r(4, 8), r(5), r(2, 3, 4), r(2, 4)), ValueError, "bias"),
    (
        linear_gated_residual,
        (r(2, 3, 8), r(4, 8), r(4), r(2, 3, 5), r(2, 4)),
        ValueError,
        "residual",
    ),
    (linear_gated_residual, (r(2, 3, 8), r(4, 8), r(4), r(2, 3, 4), r(3, 4)), ValueError, "gate"),
    (
        linear_gated_residual,
        (r(2, 3, 8), r(4, 8), r(4), r(2, 3, 4).long(), r(2, 4)),
        TypeError,
        "residual",
    ),
    (guided_update, (r(4, 8, 8), r(4, 8, 8), None, 1, 0.1), ValueError, "x"),
    (guided_update, (r(2, 4, 8, 8), r(2, 4, 8, 8), 1.5, 3, 0.1), ValueError, "raw"),
    (guided_update, (r(2, 4, 8, 8), r(4, 4, 8, 8), None, 3, 0.1), ValueError, "raw"),
    (guided_update, (r(2, 4, 8, 8), r(4, 4, 8, 8), 1.5, 5, 0.1), ValueError, "channels"),
    (guided_update, (r(2, 4, 8, 8), r(4, 4, 8, 8), r(3, 1, 1, 1), 3, 0.1), ValueError, "scale"),
    (guided_update, (r(2, 4, 8, 8), r(4, 4, 8, 8), 1.5, 3, 0.1, r(2, 4, 8, 8)), ValueError, "base"),
    (
        guided_update,
        (r(2, 4, 8, 8), r(2, 4, 8, 8), None, 3, 0.1, None, [r(2, 4, 8, 8)], []),
        ValueError,
        "weights",
    ),
    (
        guided_update,
        (r(2, 4, 8, 8), r(2, 4, 8, 8), None, 3, 0.1, None, [r(1, 4, 8, 8)], [1.0]),
        ValueError,
        "velocities[0]",
    ),
    (
        final_update,
        (r(2, 16), r(2, 8), r(2, 8), r(16, 8), r(16), r(2, 4, 8, 8), None, 4, 0.1),
        ValueError,
        "tokens",
    ),
    (
        final_update,
        (r(2, 16, 8), r(2, 8), r(2, 8), r(16, 8), r(16), r(2, 4, 8, 8), 1.5, 4, 0.1),
        ValueError,
        "tokens",
    ),
    (
        final_update,
        (r(2, 16, 8), r(1, 8), r(2, 8), r(16, 8), r(16), r(2, 4, 8, 8), None, 4, 0.1),
        ValueError,
        "shift",
    ),
    (
        final_update,
        (r(2, 16, 8), r(2, 8), r(2, 9), r(16, 8), r(16), r(2, 4, 8, 8), None, 4, 0.1),
        ValueError,
        "scale",
    ),
    (
        final_update,
        (r(2, 16, 8), r(2, 8), r(2, 8), r(16, 7), r(16), r(2, 4, 8, 8), None, 4, 0.1),
        ValueError,
        "weight",
    ),
    (
        final_update,
        (r(2, 16, 8), r(2, 8), r(2, 8), r(20, 8), r(20), r(2, 4, 8, 8), None, 4, 0.1),
        ValueError,
        "weight",
    ),
    (
        final_update,
        (r(2, 16, 8), r(2, 8), r(2, 8), r(16, 8), r(15), r(2, 4, 8, 8), None, 4, 0.1),
        ValueError,
        "bias",
    ),
    (
        final_update,
        (r(2, 15, 8), r(2, 8), r(2, 8), r(16, 8), r(16), r(2, 4, 8, 8), None, 4, 0.1),
        ValueError,
        "tokens",
    ),
    (
        final_update,
        (r(2, 16, 8), r(2, 8), r(2, 8), r(16, 8), r(16), r(2, 4, 8), None, 4, 0.1),
        ValueError,
        "x",
    ),
    (group_norm_silu, (r(2, 8, 4), r(8), r(8), 4), ValueError, "x"),
    (group_norm_silu, (r(2, 8, 4, 4), r(8), r(8), 3), ValueError, "groups"),
    (group_norm_silu, (r(2, 8, 4, 4), r(7), r(8), 4), ValueError, "weight"),
    (group_norm_silu, (r(2, 8, 4, 4), r(8), r(9), 4), ValueError, "bias"),
    (group_norm_silu, (r(2, 8, 4, 4).long(), r(8), r(8), 4), TypeError, "x"),
]


@pytest.mark.parametrize(
    "operation, args, kind, argument",
    REFUSED,
    ids=[f"{o.name}-{a}-{i}" for i, (o, _, _, a) in enumerate(REFUSED)],
)
def test_what_does_not_fit_is_refused_by_name(operation, args, kind, argument):
    with pytest.raises(kind) as refusal:
        operation(*args)
    message = str(refusal.value)
    assert message.startswith(f"{operation.name}: ")
    assert argument in message.replace(":", " ").replace(",", " ").replace("'s", " ").split()


MIXED = [
    (linear, lambda a, b: (a(2, 8), b(4, 8), a(4)), "weight"),
    (linear, lambda a, b: (a(2, 8), a(4, 8), b(4)), "bias"),
    (patch_embed, lambda a, b: (a(1, 4, 8, 8), a(16, 4, 2, 2), b(16)), "bias"),
    (
        patch_embed,
        lambda a, b: (a(1, 4, 8, 8), a(16, 4, 2, 2), a(16), None, b(16, 16)),
        "positions",
    ),
]


@pytest.mark.parametrize(
    "operation, make, argument", MIXED, ids=[f"{o.name}-{a}" for o, _, a in MIXED]
)
def test_matrix_products_refuse_mixed_dtypes_by_name(operation, make, argument):
    with pytest.raises(TypeError, match=rf"{operation.name}: .*\b{argument}\b"):
        operation(
            *make(lambda *s: torch.zeros(*s), lambda *s: torch.zeros(*s, dtype=torch.bfloat16))
        )


def test_results_have_the_first_arguments_dtype():
    """Also where modulations, velocities or scales come in a wider one. The patch embedding's is
    that of its weight.
    """
    latents = torch.randn(2, 4, 8, 8)
    weight, bias = torch.randn(16, 8, 2, 2).bfloat16(), torch.randn(16).bfloat16()
    tokens = patch_embed(latents, weight, bias, latents.double())
    assert tokens.equal(patch_embed(latents.bfloat16(), weight, bias, latents.bfloat16()))
    x = torch.randn(2, 3, 8).bfloat16()
    wide = [torch.randn(2, 8) for _ in range(3)]
    assert adaln_modulate(x, wide[0], wide[1]).dtype == torch.bfloat16
    assert [t.dtype for t in gated_residual_adaln(x, x.float(), *wide)] == [torch.bfloat16] * 2
    assert velocity_update(x, [x.double()], [0.1]).dtype == torch.bfloat16
    assert (
        guide(torch.randn(4, 4, 2, 2).bfloat16(), torch.randn(2, 1, 1, 1), 3).dtype
        == torch.bfloat16
    )
