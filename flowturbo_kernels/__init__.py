"""The operations of flow-matching DiTs: tensors in, tensors out; this package knows no model and no
plan.

Usable alone:

    from flowturbo_kernels import attention
    y = attention(qkv)          # qkv (B, T, 3, heads, head_dim) -> (B, T, heads * head_dim)

Every operation is an `Op` in `OPS`; its `.reference` is plain torch and differentiable.
"""

from . import _flash_attention, _quack
from ._cache import give_compilers_a_cache
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
from .adaln_fp8 import adaln_quantized, gated_residual_adaln_quantized
from .attention import attention
from .attention_fp8 import attention_quantized
from .branches_fp8 import attention_branch_fp8, branch_end_fp8
from .conditions import conditions
from .doubling import double_pixels, doubled_convolution, interleaved_group_norm, summed_weights
from .final_update import final_update
from .group_norm import group_norm_silu
from .guidance import guide, guided_update
from .image_blocks import residual_group_norm, shifted_group_norm, shifted_sum
from .image_ends import image_bytes, unscale_latents
from .linear import linear, linear_gated_residual
from .linear_fp8 import linear_fp8, quantize_rows, quantize_static
from .linear_quantized import linear_quantized, linear_quantized_residual
from .patch_embed import patch_embed
from .refiner_forward import refiner_forward
from .velocity_update import velocity_update

give_compilers_a_cache()

LIBRARIES = {"quack": _quack.LIBRARY, "FlashAttention-4": _flash_attention.LIBRARY}
"""Packages whose kernels are candidates where they are installed, by name."""

__all__ = [
    "BACKENDS",
    "LIBRARIES",
    "OPS",
    "BackendError",
    "Op",
    "adaln_modulate",
    "adaln_quantized",
    "attention",
    "attention_branch_fp8",
    "attention_quantized",
    "branch_end_fp8",
    "conditions",
    "double_pixels",
    "doubled_convolution",
    "final_update",
    "gated_residual_adaln",
    "gated_residual_adaln_quantized",
    "group_norm_silu",
    "guide",
    "guided_update",
    "image_bytes",
    "interleaved_group_norm",
    "linear",
    "linear_fp8",
    "linear_gated_residual",
    "linear_quantized",
    "linear_quantized_residual",
    "patch_embed",
    "quantize_rows",
    "quantize_static",
    "refiner_forward",
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
