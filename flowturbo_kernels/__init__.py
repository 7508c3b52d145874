"""The operations of flow-matching DiTs: tensors in, tensors out; this package knows no model and no
plan.

Usable alone:

    from flowturbo_kernels import attention
    y = attention(qkv)          # qkv (B, T, 3, heads, head_dim) -> (B, T, heads * head_dim)

Every operation is an `Op` in `OPS`; its `.reference` is plain torch and differentiable.
"""

from . import _flash_attention, _quack
from ._op import (
    BACKENDS,
    OPS,
    BackendError,
    Op,
    requested_backend,
    skip_checks,
    unavailable,
    use_backend,
)
from .adaln import adaln_modulate, gated_residual_adaln
from .attention import attention
from .conditions import conditions
from .doubling import double_pixels, doubled_convolution, interleaved_group_norm, summed_weights
from .final_update import final_update
from .group_norm import group_norm_silu
from .guidance import guide, guided_update
from .image_blocks import residual_group_norm, shifted_group_norm, shifted_sum
from .image_ends import image_bytes, unscale_latents
from .linear import linear, linear_gated_residual
from .linear_fp8 import linear_fp8, quantize_rows
from .patch_embed import patch_embed
from .velocity_update import velocity_update

LIBRARIES = {"quack": _quack.LIBRARY, "FlashAttention-4": _flash_attention.LIBRARY}
"""Packages whose kernels are candidates where they are installed, by name."""

__all__ = [
    "BACKENDS",
    "LIBRARIES",
    "OPS",
    "BackendError",
    "Op",
    "adaln_modulate",
    "attention",
    "conditions",
    "double_pixels",
    "doubled_convolution",
    "final_update",
    "gated_residual_adaln",
    "group_norm_silu",
    "guide",
    "guided_update",
    "image_bytes",
    "interleaved_group_norm",
    "linear",
    "linear_fp8",
    "linear_gated_residual",
    "patch_embed",
    "quantize_rows",
    "requested_backend",
    "residual_group_norm",
    "shifted_group_norm",
    "shifted_sum",
    "skip_checks",
    "summed_weights",
    "unavailable",
    "unscale_latents",
    "use_backend",
    "velocity_update",
]
