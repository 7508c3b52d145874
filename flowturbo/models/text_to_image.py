"""Text-to-image networks of diffusers in our convention, and refiners for them.

2-RF (a Stable Diffusion 1.5 UNet), SD3 and FLUX. diffusers is imported only where it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import positive
from .diffusers_io import is_path, read_pretrained
from .flow_model import FlowModel

Conditions = Mapping[str, Tensor]
"""The inputs of a network besides x and t: embeds (N, L, D) and, for some kinds of network, pooled
(N, P) and embedded_guidance (N,).
"""

Labels = Tensor | Conditions
"""Class numbers (N,), or conditions."""


class Kind(NamedTuple):
    """How one class of diffusers networks is called.

    sign: of its output relative to our velocity, data - noise.
    pooled: whether it reads a pooled text embedding.
    """

    sign: int
    call: Callable[[Any, Tensor, Tensor, Conditions], Tensor]
    pooled: bool


def _call_unet(module: Any, x: Tensor, noise_level: Tensor, c: Conditions) -> Tensor:
    return module(x, 1000 * noise_level, encoder_hidden_states=c["embeds"], return_dict=False)[0]


def _call_sd3(module: Any, x: Tensor, noise_level: Tensor, c: Conditions) -> Tensor:
    return module(
        hidden_states=x,
        timestep=1000 * noise_level,
        encoder_hidden_states=c["embeds"],
        pooled_projections=c["pooled"],
        return_dict=False,
    )[0]


def _call_flux(module: Any, x: Tensor, noise_level: Tensor, c: Conditions) -> Tensor:
    _, _, H, W = x.shape
    positions = torch.zeros(H // 2, W // 2, 3, device=x.device, dtype=x.dtype)
    positions[..., 1] = torch.arange(H // 2, device=x.device, dtype=x.dtype)[:, None]
    positions[..., 2] = torch.arange(W // 2, device=x.device, dtype=x.dtype)
    y = module(
        hidden_states=packed(x),
        timestep=noise_level.to(x.dtype),
        guidance=c.get("embedded_guidance"),
        pooled_projections=c["pooled"],
        encoder_hidden_states=c["embeds"],
        txt_ids=torch.zeros(c["embeds"].shape[1], 3, device=x.device, dtype=x.dtype),
        img_ids=positions.view(-1, 3),
        return_dict=False,
    )[0]
    return unpacked(y, H, W)


KINDS = {
    "UNet2DConditionModel": Kind(1, _call_unet, pooled=False),
    "SD3Transformer2DModel": Kind(-1, _call_sd3, pooled=True),
    "FluxTransformer2DModel": Kind(-1, _call_flux, pooled=True),
}


def packed(x: Tensor) -> Tensor:
    """FLUX's tokens, 2 x 2 patches: (N, C, H, W) -> (N, H/2 * W/2, 4C)."""
    N, C, H, W = x.shape
    return (
        x.view(N, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(N, H * W // 4, 4 * C)
    )


def unpacked(tokens: Tensor, H: int, W: int) -> Tensor:
    """The inverse of `packed`."""
    N, _, channels = tokens.shape
    return (
        tokens.view(N, H // 2, W // 2, channels // 4, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(N, channels // 4, H, W)
    )


class PromptNetwork(nn.Module):
    """A diffusers network as a predictor or refiner, in our time and sign.

    x (N, C, H, W), t (N,), conditions, v like x -> like x.
    channels: of the latents.
    multiple: the sides of the latents must be multiples of this.
    side: of the latents by default.
    longest: the longest side of the latents.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        name = type(module).__name__
        if name not in KINDS:
            raise TypeError(
                f"a text-to-image network must be one of {', '.join(KINDS)}, got {name}"
            )
        self.module, self.kind = module, KINDS[name]
        config: Any = module.config
        packs = name == "FluxTransformer2DModel"
        unet = name == "UNet2DConditionModel"
        self.channels: int = (config.out_channels or config.in_channels) // (4 if packs else 1)
        self.multiple: int = (
            2 ** (len(config.block_out_channels) - 1) if unet else 2 if packs else config.patch_size
        )
        self.side: int = 128 if packs else config.sample_size
        self.longest: int = self.multiple * (
            config.pos_embed_max_size if name == "SD3Transformer2DModel" else 2**20
        )

    def forward(self, x: Tensor, t: Tensor, y: Any, v: Tensor | None = None) -> Tensor:
        x = x if v is None else torch.cat([x, v], dim=1)
        return self.kind.sign * self.kind.call(self.module, x, 1 - t, y)


def config_of(module: Any) -> dict[str, Any]:
    """The configuration of a diffusers network, without file names."""
    return {key: value for key, value in module.config.items() if not key.startswith("_")}


def refiner_for(teacher: nn.Module, depth: int = 1) -> nn.Module:
    """A new refiner for a diffusers network, which reads x and v (paper section 3.2).

    depth: 1 or 2 blocks of the teacher's kind. For a UNet it is the number of layers per block, and
        the first width is halved in the first half of the levels and kept in the others, as in
        2-RF.
    Its last layer is zero, and so is its output. Raises TypeError for another class of network,
    ValueError for another depth.
    """
    if positive("depth", depth) > 2:
        raise ValueError(f"depth must be 1 or 2, got {depth}")
    name = type(teacher).__name__
    if name not in KINDS:
        raise TypeError(f"teacher must be one of {', '.join(KINDS)}, got {name}")
    teacher_config: Any = teacher.config  # type: ignore[union-attr]
    config = config_of(teacher)
    config["in_channels"] = 2 * teacher_config["in_channels"]
    config["out_channels"] = teacher_config["out_channels"] or teacher_config["in_channels"]
    if name == "UNet2DConditionModel":
        widths = teacher_config["block_out_channels"]
        levels, width = len(widths), widths[0]
        config |= {
            "layers_per_block": depth,
            "block_out_channels": [width // 2 if i < levels // 2 else width for i in range(levels)],
        }
    elif name == "SD3Transformer2DModel":
        config |= {"num_layers": depth, "dual_attention_layers": ()}
    else:
        config |= {"num_layers": depth, "num_single_layers": 0}
    refiner: Any = type(teacher)(**config)
    last = refiner.conv_out if name == "UNet2DConditionModel" else refiner.proj_out
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return refiner


def guidance_style(module: Any) -> Literal["halves", "embedded", "none"]:
    """How a network is guided: see PromptModel."""
    if type(module).__name__ != "FluxTransformer2DModel":
        return "halves"
    return "embedded" if module.config.guidance_embeds else "none"


def check_refiner(refiner: nn.Module | str | os.PathLike[str], teacher: Any) -> nn.Module:
    """A refiner, or the network in its folder or hub name, if it fits the teacher.

    Raises TypeError or ValueError if it does not, CheckpointError if it can't be read.
    """
    kind: Any = type(teacher)
    module: Any = refiner
    if isinstance(refiner, str | os.PathLike):
        source = str(Path(refiner).expanduser()) if is_path(refiner) else str(refiner)
        module = read_pretrained("refiner", {kind.__name__: kind}, refiner, source)
    if type(module) is not kind:
        raise TypeError(
            f"refiner must be a {kind.__name__} as the predictor is, got {type(module).__name__}"
        )
    channels, refiner_channels = teacher.config.in_channels, module.config.in_channels
    if refiner_channels != 2 * channels:
        raise ValueError(
            f"refiner must read {2 * channels} channels, x and v, got {refiner_channels}"
        )
    return module


@dataclass
class PromptModel(FlowModel):
    """A text-to-image flow model: it takes prompts where FlowModel takes class numbers.

    A prompt is a text, or what `encode` returns for it.
    guidance_style: "halves": prompt and negative prompt are evaluated in one batch and combined by
        the scale; "embedded": the scale is an input of the network (FLUX.1-dev); "none": no
        guidance.
    pipe: the diffusers pipeline whose text encoders are used; None: prompts must be encoded.
    """

    guidance_style: Literal["halves", "embedded", "none"] = "halves"
    pipe: Any = None

    def guided(self, guidance: float) -> bool:
        if self.guidance_style == "none" and guidance != 1:
            raise ValueError(
                f"guidance must be 1 for this model, which runs without guidance, got {guidance}"
            )
        return self.guidance_style == "halves" and guidance != 1

    def texts(self, prompts: str | Sequence[str]) -> list[str]:
        """Prompts as a list of texts, for `encode`.

        Raises TypeError or ValueError for other values, and if the model has no text encoders.
        """
        if not isinstance(prompts, str | Sequence):
            raise TypeError(
                f"prompts must be texts for a text-to-image model, got {type(prompts).__name__}"
            )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompts must be at least one text, got {prompts!r}")
        if self.pipe is None:
            raise ValueError(
                "prompts given as text need a model that was made from a pipeline with its text "
                "encoders"
            )
        return texts

    @torch.no_grad()
    def encode(
        self, prompts: str | Sequence[str], negative: str | Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Encode texts -> conditions for `sample`.

        They are embeds, pooled if the network reads it and, if guidance needs both halves,
        negative_embeds and negative_pooled.
        negative: one text, or one per prompt; None: the empty text.
        Raises TypeError or ValueError for other values, and if the model has no text encoders.
        """
        texts = self.texts(prompts)
        negatives = (
            [negative or ""] * len(texts)
            if negative is None or isinstance(negative, str)
            else list(negative)
        )
        if len(negatives) != len(texts):
            raise ValueError(
                f"negative must be one text or one a prompt ({len(texts)}), got {len(negatives)}"
            )
        return encode_prompts(
            self.pipe, texts, negatives if self.guidance_style == "halves" else None, self.device
        )

    def conditions(
        self,
        prompts: str | Sequence[str] | Mapping[str, Tensor],
        guidance: float,
        negative: str | Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """The conditions of the networks, on the model's device and in its dtype.

        They include the guidance scale if it is an input of the network. Raises ValueError for
        encoded prompts that lack something.
        """
        if isinstance(prompts, Mapping):
            if negative is not None:
                raise ValueError(
                    "negative must be encoded with the prompts, where these are encoded"
                )
            encoded = dict(prompts)
        else:
            encoded = self.encode(prompts, negative)
        names = {"embeds", *(["pooled"] if self._pooled else [])}
        if self.guided(guidance):
            names |= {f"negative_{name}" for name in names}
        missing = sorted(names - encoded.keys())
        if missing:
            raise ValueError(
                f"prompts must hold {', '.join(sorted(names))} for guidance={guidance}, and lack "
                f"{', '.join(missing)}"
            )
        conditions = {name: encoded[name].to(self.device, self.dtype) for name in sorted(names)}
        counts = {name: len(value) for name, value in conditions.items()}
        if len(set(counts.values())) > 1 or not min(counts.values()):
            raise ValueError(f"prompts must hold as many rows of each kind, got {counts}")
        if self.guidance_style == "embedded":
            conditions["embedded_guidance"] = torch.full(
                (counts["embeds"],), guidance, dtype=self.dtype, device=self.device
            )
        return conditions

    @property
    def _pooled(self) -> bool:
        return isinstance(self.predictor, PromptNetwork) and self.predictor.kind.pooled


@torch.no_grad()
def encode_prompts(
    pipe: Any, texts: Sequence[str], negative: Sequence[str] | None, device: torch.device | str
) -> dict[str, Tensor]:
    """The encodings of texts by a pipeline.

    Names are embeds, and pooled if its kind has it; those of the negative texts begin with
    negative_.
    negative: None: no second half is encoded.
    """
    prompts, halves = list(texts), negative is not None
    name = type(pipe).__name__
    encodings: Sequence[Tensor | None]
    if name.startswith("StableDiffusion3"):
        encodings = pipe.encode_prompt(
            prompts,
            None,
            None,
            device=device,
            negative_prompt=negative and list(negative),
            do_classifier_free_guidance=halves,
        )
    elif name.startswith("Flux"):
        embeds, pooled, _ = pipe.encode_prompt(prompts, None, device=device)
        encodings = (embeds, None, pooled, None)
        if negative is not None:
            embeds, pooled, _ = pipe.encode_prompt(list(negative), None, device=device)
            encodings = (encodings[0], embeds, encodings[2], pooled)
    else:
        encodings = pipe.encode_prompt(prompts, device, 1, halves, negative and list(negative))
    names = ("embeds", "negative_embeds", "pooled", "negative_pooled")
    return {key: value for key, value in zip(names, encodings, strict=False) if value is not None}
