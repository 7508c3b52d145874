"""SiT's blocks in fp8: layers that stay in fp8 when their model is cast, the calibration of their
static scales, and the loop over the blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowturbo_kernels import (
    adaln_quantized,
    attention_branch_fp8,
    branch_end_fp8,
    linear_fp8,
    linear_quantized,
    quantize_rows,
    use_backend,
)
from flowturbo_kernels.linear import Activation

from .sit_config import SiTConfig

KINDS = {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32}
"""The dtypes of a layer's buffers. A scale of lower precision would change the weight."""
STATIC = {"input_scale": torch.float32, "product_scale": torch.float32}
"""Those of a layer that was calibrated."""
_BITS = {torch.float8_e4m3fn: torch.uint8, torch.float32: torch.int32}
MARGIN = 2.0
"""A static scale puts this many times the calibration's largest magnitude at 448, e4m3's largest
number; what is larger saturates. The bundled digits' largest on other noise and labels were 1.4
times the calibration's. Since e4m3 is a floating-point format, a factor of two costs precision only
at its lower end, of numbers below 1/14000 of the largest.
"""
IMAGES, TIMES = 4, 8
"""Of the calibration."""
Layer = tuple[Tensor, Tensor, Tensor]
"""weight, a scale an output, bias."""


class Fp8Linear(nn.Module):
    """A linear layer with its weight in fp8 (e4m3) and one scale per output.

    The input is quantised row by row, or beforehand: by what computes it, row by row too or with a
    static scale, `input_scale` (1,), that `calibrate` has found. product_scale (N,) is then
    weight_scale * input_scale. The layer moves between devices like others, but casts such as
    to(dtype) change only its bias and `plain`.

    plain: the weight before it was quantised, if it is kept.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    product_scale: Tensor | None

    def __init__(self, layer: nn.Linear, keep: bool = False) -> None:
        super().__init__()
        weight, scale = quantize_rows(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", None)
        self.register_buffer("product_scale", None)
        self.plain = layer.weight if keep else None
        self.bias = layer.bias

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """x (..., K) -> (..., N), in x's dtype.

        Raises TypeError if weight or scale were cast to another dtype in spite of `_apply`.
        """
        return linear_fp8(x, *self.by_rows(), activation)

    def by_rows(self) -> Layer:
        """(weight, weight_scale, bias), for an input with a scale a row. TypeError as `forward`."""
        self._check_kinds()
        return self.weight, self.weight_scale, self.bias

    def static(self) -> Layer:
        """(weight, product_scale, bias), for an input with the static scale. TypeError as
        `forward`.
        """
        self._check_kinds()
        assert self.product_scale is not None
        return self.weight, self.product_scale, self.bias

    def set_input_scale(self, scale: Tensor) -> None:
        """scale (1,) float32, of inputs that are quantised beforehand."""
        self.input_scale = scale
        self.product_scale = self.weight_scale * scale

    def _check_kinds(self) -> None:
        # Checked here too, since skip_checks() leaves out the checks of the operation.
        if any(getattr(self, name).dtype != kind for name, kind in self._kinds().items()):
            found = {name: getattr(self, name).dtype for name in self._kinds()}
            raise TypeError(
                f"a layer in fp8 must have {_described(self._kinds())}, got {_described(found)}: "
                "was it cast?"
            )

    def _kinds(self) -> dict[str, torch.dtype]:
        return KINDS if self.input_scale is None else KINDS | STATIC

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """The function behind to(), half(), cuda() and the like.

        Those cast no integers, so weight and scales are passed to them as integers.
        """
        kept = [getattr(self, name) for name in self._kinds()]

        def moved(t: Tensor) -> Tensor:
            if not any(t is k for k in kept) or t.dtype not in _BITS:
                return fn(t)
            bits = t.view(_BITS[t.dtype])
            result = fn(bits)
            if result is bits:
                return t
            if result.dtype != bits.dtype:  # by type(), which casts integers too
                result = bits.to(result.device)
            return result.view(t.dtype)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Refuse weights and scales of other dtypes, and weights without their static scales.

        torch would cast them silently, and a weight is meaningless without its own scales.
        """
        errors: list[str] = rest[-1]
        given = [name for name in STATIC if prefix + name in state]
        if given and self.input_scale is None:
            self.set_input_scale(torch.ones(1, dtype=torch.float32, device=self.weight.device))
        elif self.input_scale is not None and prefix + "weight" in state and not given:
            errors.append(
                f"{prefix}input_scale is missing: this state is of a layer in fp8 that was not "
                "calibrated; quantise the model that it was made of again"
            )
        for name, kind in (KINDS | STATIC).items():
            value = state.get(prefix + name)
            if value is not None and value.dtype != kind:
                errors.append(
                    f"{prefix}{name} must be {kind}, of a layer in fp8, got {value.dtype}"
                )
        super()._load_from_state_dict(state, prefix, *rest)


def _described(dtypes: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())


@torch.no_grad()
def calibrate(
    config: SiTConfig,
    like: Tensor,
    layers: Sequence[Fp8Linear],
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    """Set the static scales of these layers of a SiT by their inputs' largest magnitudes while it
    makes some images. like: of its device and dtype.

    velocity(x, t, y): of the SiT, in flowturbo's convention of time. Euler's method takes seeded
    noise to images of random labels, and at each time noise of that scale alone is tried too. The
    same weights on the same device get the same scales.
    """
    largest: dict[nn.Module, Tensor] = {}

    def record(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        found = inputs[0].abs().amax().float()
        largest[layer] = torch.maximum(largest[layer], found) if layer in largest else found

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    kind = like.device.type
    plain = (
        torch.autocast(kind, enabled=False)
        if torch.amp.is_autocast_available(kind)
        else contextlib.nullcontext()
    )
    try:
        with plain:
            _sample(config, like, velocity)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers:
        scale = (largest[layer] * (MARGIN / 448)).clamp(min=1e-12)
        layer.set_input_scale(scale.view(1))


def _sample(
    config: SiTConfig, like: Tensor, velocity: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    """Evaluate the velocity on images on their way from noise, and on noise, at the same times, at
    every size that the network was trained on.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    for side in (config.side, *config.sides):
        _sample_at(config, side, generator, like, velocity)


def _sample_at(
    config: SiTConfig,
    side: int,
    generator: torch.Generator,
    like: Tensor,
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    shape = IMAGES, config.channels, side, side
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(
        like.device, like.dtype
    )
    labels = torch.randint(config.label_rows, (IMAGES,), generator=generator, device="cpu").to(
        like.device
    )
    x = noise
    with use_backend("reference"):  # no kernel is chosen for these few calls
        for i in range(TIMES):
            t = torch.full((IMAGES,), i / (TIMES - 1), device=like.device, dtype=torch.float32)
            velocity(noise, t, labels)
            x = x + velocity(x, t, labels) / TIMES


def run_blocks_fp8(
    blocks: Sequence[Any], x: Tensor, modulations: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of a calibrated SiT, without the last residual: each value is quantised by the
    operation that computes it.

    Arguments and results: as of flowturbo_kernels.refiner_forward's run_blocks.
    """
    chunks = [m.chunk(6, dim=-1) for m in modulations]
    h, h_scale = adaln_quantized(x, chunks[0][0], chunks[0][1])
    for block, (_, _, gate_msa, shift_mlp, scale_mlp, gate_mlp), following in zip(
        blocks, chunks, [*chunks[1:], None], strict=True
    ):
        qkv: Fp8Linear = block.attn.qkv
        proj: Fp8Linear = block.attn.proj
        fc1: Fp8Linear = block.mlp.fc1
        fc2: Fp8Linear = block.mlp.fc2
        assert proj.input_scale is not None
        y = linear_quantized(h, h_scale, *qkv.by_rows())
        x, h, h_scale = attention_branch_fp8(
            y.view(*x.shape[:2], 3, block.attn.heads, -1),
            proj.input_scale, *proj.static(), proj.plain, x, gate_msa, shift_mlp, scale_mlp
        )  # fmt: skip
        y = linear_quantized(h, h_scale, *fc1.by_rows(), "gelu_tanh", fc2.input_scale)
        if following is not None:
            x, h, h_scale = branch_end_fp8(
                y, *fc2.static(), x, gate_mlp, following[0], following[1]
            )
    return x, linear_quantized(y, None, *fc2.static()), gate_mlp
