"""The decoder of an AutoencoderKL in few passes over memory.

Convolutions run without their biases. The kernels between them add the biases and the residuals,
and take the statistics of the GroupNorm that follows in the pass that writes its input. The
decoder's modules, parameters and state dict stay; the order in which they run is that of the plain
decoder, which runs wherever this one does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowturbo_kernels import (
    doubled_convolution,
    group_norm_silu,
    requested_backend,
    residual_group_norm,
    shifted_group_norm,
    shifted_sum,
    summed_weights,
    unavailable,
)

from .hooks import untouched

Sum = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""What shifted_sum takes: a convolution without its bias, the bias, a residual, and its bias."""


class GroupNormSiLU(nn.GroupNorm):
    """silu(GroupNorm(x)) in one operation, with the parameters of a GroupNorm."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class FusedDecoder(nn.Module):
    """A decoder with the parts of another, which it runs in few passes.

    It runs the plain one under autocast and torch.compile, where gradients are needed, off CUDA
    unless Triton's kernels are asked for, and where a part is not what it should be, or has hooks.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self._modules = plain._modules  # a part that is exchanged in one is in both
        self._plain = (plain,)  # in a tuple, it is no part of this one
        self._summed: dict[str, tuple[Any, ...]] = {}
        self.training = plain.training
        for i, part in enumerate(_parts(self)):
            if _is_upsampler(part) and part.conv.weight.device.type == "cuda":
                self._sum_weights(str(i), part.conv.weight)

    def forward(self, sample: Tensor, *args: Any, **options: Any) -> Tensor:
        """Latents after post_quant_conv (N, C, H, W) -> images (N, 3, height, width)."""
        extra = any(value is not None for value in (*args, *options.values()))
        if extra or not self.suits(sample):
            result: Tensor = self._plain[0](sample, *args, **options)
            return result
        return self.in_few_passes(sample)

    def suits(self, sample: Tensor) -> bool:
        """Whether this decoder runs now, rather than the plain one."""
        if torch.compiler.is_compiling():
            return False
        name, kind = requested_backend(), sample.device.type
        return (
            (name == "triton" or (name == "auto" and kind == "cuda"))
            and not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
            and unavailable("triton", sample.device) is None
            and all(p.dtype == sample.dtype for p in self.parameters())
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in self._inputs(sample)))
            and untouched(self)
            and fits(self)
        )

    def made_of(self) -> list[int | None]:
        """The versions of the weights whose sums a captured run has; when one has changed, the run
        is captured again.
        """
        weights = (
            getattr(part.conv, "weight", None) for part in self.modules() if _is_upsampler(part)
        )
        return [_version(w) for w in weights if isinstance(w, Tensor)] if self._summed else []

    def _inputs(self, sample: Tensor) -> Iterator[Tensor]:
        yield sample
        yield from self.parameters()

    def in_few_passes(self, sample: Tensor) -> Tensor:
        """The same as the plain decoder, but for rounding."""
        one: Any = self
        parts = list(_parts(one))
        norms = [*map(_first_norm, parts[1:]), one.conv_norm_out]
        total: Sum = _convolved(one.conv_in, sample), one.conv_in.bias, None, None
        h, normalised = _seam(total, _first_norm(parts[0]))
        for i, (part, norm) in enumerate(zip(parts, norms, strict=True)):
            if not _is_upsampler(part):
                total = _branch(part, h, normalised)
                if norm is not None:  # no doubling is next
                    h, normalised = _seam(total, norm)
                continue
            summed = self._summed_weights(str(i), part.conv.weight)
            norm_of = norm.weight, norm.bias, norm.num_groups, norm.eps, _is_silu(norm)
            h, normalised = doubled_convolution(
                total, part.conv.weight, summed, part.conv.bias, *norm_of
            )
        return shifted_sum(_convolved(one.conv_out, normalised), one.conv_out.bias)

    def _summed_weights(self, name: str, weight: Tensor) -> Tensor | None:
        """The weights of the four 2 x 2 convolutions, if these are a candidate."""
        if not _has_candidates(weight):
            return None
        if self._summed.get(name) != _identity(weight):
            if torch.cuda.is_current_stream_capturing():
                return None
            self._sum_weights(name, weight)
        found: Tensor = getattr(self, f"summed_{name}")
        return found

    def _sum_weights(self, name: str, weight: Tensor) -> None:
        """Again when the weight has changed: then it is another buffer, at another address, which
        captures watch.
        """
        with torch.inference_mode(False), torch.no_grad():
            summed = summed_weights(weight)
        self.register_buffer(f"summed_{name}", summed, persistent=False)
        self._summed[name] = _identity(weight)


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version


def _identity(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), _version(weight), weight.dtype, weight.device


def _has_candidates(weight: Tensor) -> bool:
    """Whether ways of a convolution with this weight are measured against each other."""
    return weight.device.type == "cuda" and requested_backend() == "auto"


def _parts(decoder: Any) -> Iterator[Any]:
    """Residual blocks, attentions and upsamplers, as they run."""
    first, *others = decoder.mid_block.resnets
    yield first
    for attention, resnet in zip(decoder.mid_block.attentions, others, strict=True):
        if attention is not None:
            yield attention
        yield resnet
    for block in decoder.up_blocks:
        yield from block.resnets
        yield from getattr(block, "upsamplers", None) or ()


def _is_upsampler(part: nn.Module) -> bool:
    return set(part._modules) == {"conv"}


def _is_attention(part: nn.Module) -> bool:
    return "group_norm" in part._modules


def _is_silu(norm: nn.Module) -> bool:
    return type(norm) is not nn.GroupNorm


def _first_norm(part: Any) -> Any:
    """The GroupNorm that a part begins with, or None."""
    if _is_upsampler(part):
        return None
    return part.group_norm if _is_attention(part) else part.norm1


def _convolved(conv: Any, x: Tensor) -> Tensor:
    """Without the bias."""
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def _seam(total: Sum, norm: Any) -> tuple[Tensor, Tensor]:
    return residual_group_norm(
        *total, norm.weight, norm.bias, norm.num_groups, norm.eps, _is_silu(norm)
    )


def _branch(part: Any, h: Tensor, normalised: Tensor) -> Sum:
    """What a residual block or an attention makes of h, and of h after its first GroupNorm."""
    if _is_attention(part):
        return _attention(part, h, normalised)
    y = _convolved(part.conv1, normalised)
    norm = part.norm2
    y = shifted_group_norm(
        y, part.conv1.bias, norm.weight, norm.bias, norm.num_groups, norm.eps, True
    )
    y = _convolved(part.conv2, y)
    if part.conv_shortcut is None:
        return y, part.conv2.bias, h, None
    return y, part.conv2.bias, _convolved(part.conv_shortcut, h), part.conv_shortcut.bias


def _attention(part: Any, h: Tensor, normalised: Tensor) -> Sum:
    N, C, H, W = h.shape
    tokens = normalised.permute(0, 2, 3, 1).reshape(N, H * W, C)
    q, k, v = (layer(tokens)[:, None] for layer in (part.to_q, part.to_k, part.to_v))
    y = F.linear(F.scaled_dot_product_attention(q, k, v)[:, 0], part.to_out[0].weight)
    return y.view(N, H, W, C).permute(0, 3, 1, 2), part.to_out[0].bias, h, None


# Which decoders these are


def fits(decoder: nn.Module) -> bool:
    """Whether a decoder is made of the parts, with the settings, that FusedDecoder knows; its
    activations are fused into its norms already.
    """
    one: Any = decoder
    try:
        parts, ends = list(_parts(one)), (one.conv_in, one.conv_out)
        norm, activation, names = one.conv_norm_out, one.conv_act, set(one._modules)
        pairs = len(one.mid_block.attentions), len(one.mid_block.resnets) - 1
    except (AttributeError, TypeError, ValueError):
        return False
    expected = {"conv_in", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out"}
    return (
        names == expected
        and pairs[0] == pairs[1]
        and all(_is_convolution(conv, 3) for conv in ends)
        and _is_fused(norm, activation)
        and not _is_attention(parts[0])
        and not _is_upsampler(parts[-1])
        and all(_is_known(part) for part in parts)
    )


def _is_known(part: nn.Module) -> bool:
    if _is_upsampler(part):
        return _is_convolution(part.conv, 3) and _has(
            part, norm=None, use_conv=True, use_conv_transpose=False, interpolate=True
        )
    return _is_known_attention(part) if _is_attention(part) else _is_known_block(part)


def _is_known_block(part: Any) -> bool:
    shortcut = getattr(part, "conv_shortcut", None)
    return (
        set(part._modules) - {"dropout", "conv_shortcut"}
        == {"norm1", "conv1", "norm2", "conv2", "nonlinearity"}
        and all(_is_convolution(conv, 3) for conv in (part.conv1, part.conv2))
        and (shortcut is None or _is_convolution(shortcut, 1))
        and all(_is_fused(norm, part.nonlinearity) for norm in (part.norm1, part.norm2))
        and _drops_nothing(getattr(part, "dropout", None))
        and _has(part, time_emb_proj=None, upsample=None, downsample=None, output_scale_factor=1)
        and getattr(part, "time_embedding_norm", "group") in ("default", "group")
    )


def _is_known_attention(part: Any) -> bool:
    if set(part._modules) != {"group_norm", "to_q", "to_k", "to_v", "to_out"}:
        return False
    layers = [part.to_q, part.to_k, part.to_v, part.to_out[0]]
    processor = type(getattr(part, "processor", None)).__name__
    return (
        type(part.group_norm) is nn.GroupNorm
        and part.group_norm.affine
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)
        and all(_drops_nothing(layer) for layer in list(part.to_out)[1:])
        and processor in ("NoneType", "AttnProcessor2_0")
        and _has(
            part, heads=1, spatial_norm=None, norm_q=None, norm_k=None, residual_connection=True,
            rescale_output_factor=1,
        )
    )  # fmt: skip


def _has(part: nn.Module, **settings: Any) -> bool:
    """Whether a part has these settings, or does not know them."""
    return all(getattr(part, name, value) == value for name, value in settings.items())


def _drops_nothing(dropout: nn.Module | None) -> bool:
    return dropout is None or (
        type(dropout) is nn.Dropout and (dropout.p == 0 or not dropout.training)
    )


def _is_convolution(conv: Any, side: int) -> bool:
    """Plain, with a bias, and of the size of its input."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (side, side)
        and conv.padding == (side // 2, side // 2)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.bias is not None
    )


def _is_fused(norm: nn.Module, activation: nn.Module) -> bool:
    return type(norm) is GroupNormSiLU and type(activation) is nn.Identity
