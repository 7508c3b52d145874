"""Text-to-image networks of diffusers in our convention: 2-RF (a Stable Diffusion 1.5 UNet), SD3
and FLUX; and refiners for them.

diffusers is imported where it is needed, not here.
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
"""What a network is told of its rows: embeds (N, L, D), pooled (N, P) where the kind has it,
embedded_guidance (N,) likewise.
"""

Labels = Tensor | Conditions
"""Class numbers (N,), or conditions."""


class Kind(NamedTuple):
    """How one class of diffusers networks is called. sign: of its output as our velocity, data -
    noise.
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
    place = torch.zeros(H // 2, W // 2, 3, device=x.device, dtype=x.dtype)
    place[..., 1] = torch.arange(H // 2, device=x.device, dtype=x.dtype)[:, None]
    place[..., 2] = torch.arange(W // 2, device=x.device, dtype=x.dtype)
    y = module(
        hidden_states=packed(x),
        timestep=noise_level.to(x.dtype),
        guidance=c.get("embedded_guidance"),
        pooled_projections=c["pooled"],
        encoder_hidden_states=c["embeds"],
        txt_ids=torch.zeros(c["embeds"].shape[1], 3, device=x.device, dtype=x.dtype),
        img_ids=place.view(-1, 3),
        return_dict=False,
    )[0]
    return unpacked(y, H, W)


KINDS = {
    "UNet2DConditionModel": Kind(1, _call_unet, pooled=False),
    "SD3Transformer2DModel": Kind(-1, _call_sd3, pooled=True),
    "FluxTransformer2DModel": Kind(-1, _call_flux, pooled=True),
}


def packed(x: Tensor) -> Tensor:
    """FLUX's tokens: (N, C, H, W) -> (N, H/2 * W/2, 4C), each a square of two by two."""
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
    """A diffusers network as a predictor or refiner: x (N, C, H, W), t (N,), conditions, v -> like
    x, in our time and sign.
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
        """Of the latents."""
        self.multiple: int = (
            2 ** (len(config.block_out_channels) - 1) if unet else 2 if packs else config.patch_size
        )
        """Of this the sides of the latents must be."""
        self.side: int = 128 if packs else config.sample_size
        """Of the latents, unless told otherwise."""
        self.longest: int = self.multiple * (
            config.pos_embed_max_size if name == "SD3Transformer2DModel" else 2**20
        )

    def forward(self, x: Tensor, t: Tensor, y: Any, v: Tensor | None = None) -> Tensor:
        x = x if v is None else torch.cat([x, v], dim=1)
        return self.kind.sign * self.kind.call(self.module, x, 1 - t, y)


def config_of(module: Any) -> dict[str, Any]:
    """What a diffusers network was made by, without names of files."""
    return {key: value for key, value in module.config.items() if not key.startswith("_")}


def refiner_for(teacher: nn.Module, depth: int = 1) -> nn.Module:
    """A new refiner for a diffusers network: `depth` blocks (1 or 2) of its kind, which reads x and
    v (paper section 3.2).

    Its last layer is zero, and so is what it returns.

    For a UNet, 2-RF's: one layer a block, and the first width halved for the upper half of the
    levels, kept for the lower.
    """
    if positive("depth", depth) > 2:
        raise ValueError(f"depth must be 1 or 2, got {depth}")
    name = type(teacher).__name__
    if name not in KINDS:
        raise TypeError(f"teacher must be one of {', '.join(KINDS)}, got {name}")
    old: Any = teacher.config  # type: ignore[union-attr]
    config = config_of(teacher)
    config["in_channels"] = 2 * old["in_channels"]
    config["out_channels"] = old["out_channels"] or old["in_channels"]
    if name == "UNet2DConditionModel":
        levels, width = len(old["block_out_channels"]), old["block_out_channels"][0]
        config |= {
            "layers_per_block": depth,
            "block_out_channels": [width // 2 if i < levels // 2 else width for i in range(levels)],
        }
    elif name == "SD3Transformer2DModel":
        config |= {"num_layers": depth, "dual_attention_layers": ()}
    else:
        config |= {"num_layers": depth, "num_single_layers": 0}
    made: Any = type(teacher)(**config)
    last = made.conv_out if name == "UNet2DConditionModel" else made.proj_out
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return made


def guidance_style(module: Any) -> Literal["halves", "embedded", "none"]:
    if type(module).__name__ != "FluxTransformer2DModel":
        return "halves"
    return "embedded" if module.config.guidance_embeds else "none"


def check_refiner(given: nn.Module | str | os.PathLike[str], teacher: Any) -> nn.Module:
    """A refiner, or the folder or hub name of one -> the network, if it fits the teacher."""
    kind: Any = type(teacher)
    module: Any = given
    if isinstance(given, str | os.PathLike):
        where = str(Path(given).expanduser()) if is_path(given) else str(given)
        module = read_pretrained("refiner", {kind.__name__: kind}, given, where)
    if type(module) is not kind:
        raise TypeError(
            f"refiner must be a {kind.__name__} as the predictor is, got {type(module).__name__}"
        )
    wanted, got = teacher.config.in_channels, module.config.in_channels
    if got != 2 * wanted:
        raise ValueError(f"refiner must read {2 * wanted} channels, x and v, got {got}")
    return module


@dataclass
class PromptModel(FlowModel):
    """A text-to-image flow model. Where FlowModel takes class numbers, it takes prompts: texts, or
    what `encode` made of them.

    guidance_style: "halves": prompt and negative prompt in one batch, combined by the scale;
    "embedded": the scale is an input of the network (FLUX.1-dev); "none". pipe: the diffusers
    pipeline whose text encoders are used; None: prompts must be encoded.
    """

    guidance_style: Literal["halves", "embedded", "none"] = "halves"
    pipe: Any = None

    def guided(self, guidance: float) -> bool:
        if self.guidance_style == "none" and guidance != 1:
            raise ValueError(
                f"guidance must be 1 for this model, which was made to run without, got {guidance}"
            )
        return self.guidance_style == "halves" and guidance != 1

    def texts(self, prompts: str | Sequence[str]) -> list[str]:
        """Prompts that `encode` can take, as a list. ValueError where the model came without text
        encoders.
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
        """Texts -> conditions: embeds, pooled and, where guidance needs halves, negative_embeds and
        negative_pooled.

        negative: one text or one a prompt; None: the empty text. ValueError where the model came
            without text encoders.
        """
        texts = self.texts(prompts)
        against = (
            [negative or ""] * len(texts)
            if negative is None or isinstance(negative, str)
            else list(negative)
        )
        if len(against) != len(texts):
            raise ValueError(
                f"negative must be one text or one a prompt ({len(texts)}), got {len(against)}"
            )
        return encode_prompts(
            self.pipe, texts, against if self.guidance_style == "halves" else None, self.device
        )

    def conditions(
        self,
        prompts: str | Sequence[str] | Mapping[str, Tensor],
        guidance: float,
        negative: str | Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """What the networks are told, on the model's device, in its dtype, guidance that is an
        input included.
        """
        if isinstance(prompts, Mapping):
            if negative is not None:
                raise ValueError(
                    "negative must be encoded with the prompts, where these are encoded"
                )
            given = dict(prompts)
        else:
            given = self.encode(prompts, negative)
        wanted = {"embeds", *(["pooled"] if self._pooled else [])}
        if self.guided(guidance):
            wanted |= {f"negative_{name}" for name in wanted}
        missing = sorted(wanted - given.keys())
        if missing:
            raise ValueError(
                f"prompts must hold {', '.join(sorted(wanted))} for guidance={guidance}, and lack "
                f"{', '.join(missing)}"
            )
        made = {name: given[name].to(self.device, self.dtype) for name in sorted(wanted)}
        counts = {name: len(value) for name, value in made.items()}
        if len(set(counts.values())) > 1 or not min(counts.values()):
            raise ValueError(f"prompts must hold as many rows of each kind, got {counts}")
        if self.guidance_style == "embedded":
            made["embedded_guidance"] = torch.full(
                (counts["embeds"],), guidance, dtype=self.dtype, device=self.device
            )
        return made

    @property
    def _pooled(self) -> bool:
        return isinstance(self.predictor, PromptNetwork) and self.predictor.kind.pooled


@torch.no_grad()
def encode_prompts(
    pipe: Any, texts: Sequence[str], negative: Sequence[str] | None, device: torch.device | str
) -> dict[str, Tensor]:
    """A pipeline's encoding of texts: embeds, pooled where its kind has it, and the same of the
    negative ones, as negative_...
    """
    given, halves = list(texts), negative is not None
    name = type(pipe).__name__
    found: Sequence[Tensor | None]
    if name.startswith("StableDiffusion3"):
        found = pipe.encode_prompt(
            given,
            None,
            None,
            device=device,
            negative_prompt=negative and list(negative),
            do_classifier_free_guidance=halves,
        )
    elif name.startswith("Flux"):
        embeds, pooled, _ = pipe.encode_prompt(given, None, device=device)
        found = (embeds, None, pooled, None)
        if negative is not None:
            embeds, pooled, _ = pipe.encode_prompt(list(negative), None, device=device)
            found = (found[0], embeds, found[2], pooled)
    else:
        found = pipe.encode_prompt(given, device, 1, halves, negative and list(negative))
    names = ("embeds", "negative_embeds", "pooled", "negative_pooled")
    return {key: value for key, value in zip(names, found, strict=False) if value is not None}
