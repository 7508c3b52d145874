"""What does not fit an operation is refused by name."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flowturbo_kernels import (
    adaln_modulate,
    attention,
    conditions,
    double_pixels,
    final_update,
    gated_residual_adaln,
    group_norm_silu,
    guide,
    guided_update,
    image_bytes,
    interleaved_group_norm,
    linear,
    linear_gated_residual,
    linear_quantized,
    patch_embed,
    residual_group_norm,
    shifted_group_norm,
    shifted_sum,
    unscale_latents,
    velocity_update,
)


def r(*shape: int) -> Tensor:
    return torch.zeros(shape)


LAYER = r(2, 16, 8), r(2, 8), r(2, 8), r(16, 8), r(16)
"""final_update's tensors before x."""

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
    (
        final_update,
        (*LAYER, r(2, 4, 8, 8), None, 4, 0.1, None, (), (), 1e-6, r(2, 16, 8)),
        ValueError,
        "gate",
    ),
    (
        final_update,
        (*LAYER, r(2, 4, 8, 8), None, 4, 0.1, None, (), (), 1e-6, r(2, 15, 8), r(2, 8)),
        ValueError,
        "branch",
    ),
    (
        final_update,
        (*LAYER, r(2, 4, 8, 8), None, 4, 0.1, None, (), (), 1e-6, r(2, 16, 8), r(1, 8)),
        ValueError,
        "gate",
    ),
    # N + 1 rows stand for both halves of guidance, and no other number does.
    (adaln_modulate, (r(6, 5, 8), r(3, 8), r(3, 8)), ValueError, "shift"),
    (adaln_modulate, (r(5, 5, 8), r(3, 8), r(3, 8)), ValueError, "shift"),
    (adaln_modulate, (r(6, 5, 8), r(4, 8), r(6, 8)), ValueError, "scale"),
    (gated_residual_adaln, (r(6, 5, 8), r(6, 5, 8), *[r(5, 8)] * 3), ValueError, "gate"),
    (conditions, (r(2, 8), [0.1], r(8, 5), r(8), r(8, 8), r(8)), ValueError, "weight1"),
    (conditions, (r(2, 8), [0.1], r(8, 6), r(8), r(8, 7), r(8)), ValueError, "weight2"),
    (conditions, (r(2, 8), [0.1], r(8, 6), r(7), r(8, 8), r(8)), ValueError, "bias1"),
    (conditions, (r(2, 8), [0.1], r(8, 6), r(8), r(8, 8), r(9)), ValueError, "bias2"),
    (conditions, (r(2, 8), [0.1], r(8, 6), r(8), r(8, 8), r(8), r(2, 8)), ValueError, "null"),
    (conditions, (r(2, 8), [], r(8, 6), r(8), r(8, 8), r(8)), ValueError, "times"),
    (patch_embed, (r(1, 4, 8, 8), r(16, 4, 2, 2), r(16), None, None, 3), ValueError, "copies"),
    (
        patch_embed,
        (r(1, 4, 8, 8), r(16, 8, 2, 2), r(16), r(1, 4, 8, 8), None, 2),
        ValueError,
        "copies",
    ),
    (
        patch_embed,
        (r(2, 4, 8, 8), r(16, 4, 2, 2), r(16), None, None, 1, r(1, 4, 8, 8), 0.1),
        ValueError,
        "velocities[0]",
    ),
    (shifted_sum, (r(2, 8, 4), r(8)), ValueError, "y"),
    (shifted_sum, (r(2, 8, 4, 4), r(7)), ValueError, "shift"),
    (shifted_sum, (r(2, 8, 4, 4), r(8), r(2, 8, 4, 5)), ValueError, "residual"),
    (shifted_sum, (r(2, 8, 4, 4), r(8), None, r(8)), ValueError, "residual_shift"),
    (double_pixels, (r(2, 8, 4, 4), None, r(2, 8, 4, 4)), ValueError, "residual"),
    (interleaved_group_norm, (r(2, 6, 4, 4), r(2), r(2), r(2), 1), ValueError, "y"),
    (interleaved_group_norm, (r(2, 8, 1, 4), r(2), r(2), r(2), 1), ValueError, "y"),
    (shifted_group_norm, (r(2, 8, 4, 4), r(7), r(8), r(8), 4), ValueError, "shift"),
    (residual_group_norm, (r(2, 8, 4, 4), r(8), None, None, r(8), r(8), 3), ValueError, "groups"),
    (image_bytes, (r(2, 3, 4, 4).long(),), TypeError, "x"),
    (unscale_latents, (r(2, 4, 4, 4), 1.0, 0.0, torch.uint8), TypeError, "dtype"),
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


def test_no_images_give_none():
    """Of both halves of guidance, too, whose modulations then are the null class's row alone."""
    x, row = r(0, 4, 8), r(1, 8)
    assert adaln_modulate(x, row, row).shape == (0, 4, 8)
    assert [y.shape for y in gated_residual_adaln(x, x, row, row, row)] == [(0, 4, 8)] * 2
    args = r(0, 4, 8), row, row, r(16, 8), r(16), r(0, 4, 4, 4), 1.5, 4, 0.1
    assert [y.shape for y in final_update(*args)] == [(0, 4, 4, 4)] * 2
    sums = interleaved_group_norm(r(0, 8, 3, 2), r(2), r(2), r(2), 1)
    assert [y.shape for y in sums] == [(0, 2, 4, 2)] * 2


def test_products_of_no_numbers_are_the_bias():
    x, weight = (r(n, 0).to(torch.float8_e4m3fn) for n in (3, 4))
    assert linear_quantized(x, r(3), weight, r(4), r(4) + 2).eq(2).all()
