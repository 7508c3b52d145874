"""The decoder of Stable Diffusion's autoencoder in plain torch, with diffusers' names, for machines
without diffusers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Resnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.GroupNorm(groups, inputs, eps=1e-6),
            nn.GroupNorm(groups, outputs, eps=1e-6),
        )
        self.conv1, self.conv2 = (nn.Conv2d(c, outputs, 3, padding=1) for c in (inputs, outputs))
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None
        self.nonlinearity: nn.Module = nn.SiLU()
        self.time_emb_proj = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(h)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.transpose(1, 2).reshape(x.shape)


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Upsampler(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Up(nn.Module):
    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            Resnet(inputs if i == 0 else outputs, outputs, groups) for i in range(layers)
        )
        if not last:
            self.upsamplers = nn.ModuleList([Upsampler(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class Decoder(nn.Module):
    def __init__(
        self, widths: tuple[int, ...], layers: int, latent_channels: int, groups: int
    ) -> None:
        super().__init__()
        downwards = widths[::-1]
        self.conv_in = nn.Conv2d(latent_channels, downwards[0], 3, padding=1)
        self.mid_block = Middle(downwards[0], groups)
        pairs = zip((downwards[0], *downwards), downwards, strict=False)
        self.up_blocks = nn.ModuleList(
            Up(inputs, outputs, layers + 1, groups, last=i == len(widths) - 1)
            for i, (inputs, outputs) in enumerate(pairs)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_act: nn.Module = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(self.conv_act(self.conv_norm_out(h)))


class Autoencoder(nn.Module):
    """What DiffusersVAE asks of an AutoencoderKL in order to decode. Its state is part of
    AutoencoderKL's.
    """

    def __init__(
        self, widths: tuple[int, ...] = (128, 256, 512, 512), layers: int = 2, groups: int = 32
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            scaling_factor=0.18215, latent_channels=4, block_out_channels=widths
        )
        self.post_quant_conv = nn.Conv2d(4, 4, 1)
        self.decoder = Decoder(widths, layers, 4, groups)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.decoder(self.post_quant_conv(z)))


class Whole(nn.Module):
    """All that decoding calls of an autoencoder as one network, to be compiled or wrapped.

    layout: of its weights and activations, torch.channels_last or torch.contiguous_format.
    """

    def __init__(self, autoencoder: Autoencoder, layout: torch.memory_format) -> None:
        super().__init__()
        self.layout = layout
        self.post_quant_conv, self.decoder = autoencoder.post_quant_conv, autoencoder.decoder
        self.to(memory_format=layout)

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z.contiguous(memory_format=self.layout)))

    @classmethod
    def of(
        cls,
        autoencoder: Autoencoder,
        layout: torch.memory_format,
        wrap: Callable[[nn.Module], nn.Module],
    ) -> Autoencoder:
        """A copy of the autoencoder that decodes by what `wrap` makes of the whole."""
        made = copy.deepcopy(autoencoder)
        made.decoder, made.post_quant_conv = wrap(cls(made, layout)), nn.Identity()
        return made
