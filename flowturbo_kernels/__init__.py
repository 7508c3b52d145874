"""The operations of flow-matching DiTs: tensors in, tensors out; no model and no plan is known here.

Usable alone:

    from flowturbo_kernels import attention
    y = attention(qkv)          # qkv (B, T, 3, heads, head_dim) -> (B, T, heads * head_dim)

Every operation is an `Op` in `OPS`; its `.reference` is plain torch and differentiable.
"""

from ._op import OPS, Op
from .adaln import adaln_modulate, gated_residual_adaln
from .attention import attention
from .linear import linear
from .patch_embed import patch_embed
from .velocity_update import guide, velocity_update

__all__ = [
    "OPS",
    "Op",
    "adaln_modulate",
    "attention",
    "gated_residual_adaln",
    "guide",
    "linear",
    "patch_embed",
    "velocity_update",
]
