"""Laws of every operation: it means its formula, errs little in every dtype, and reads strides."""

import math

import pytest
import torch
from close import assert_close, relative_error
from formulas import MEANING, long_seam
from ops import CASES, DTYPES, NAMES, case, examples, mapped, strided, tensors
from torch import Tensor

from flowturbo_kernels import (
    OPS,
    adaln_modulate,
    attention,
    gated_residual_adaln,
    guide,
    patch_embed,
    velocity_update,
)


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
