"""Text-to-image and text-to-video models of diffusers' networks: prompts in, latents out.

diffusers is imported only where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .flow_model import FlowModel
from .prompt_kind import Conditions, GuidanceStyle, Kind, Labels, packed, unpacked
from .prompt_kinds import KINDS, kind_of
from .prompt_network import PromptNetwork, config_of
from .refiners import check_refiner, refiner_for

__all__ = [
    "KINDS",
    "Conditions",
    "Labels",
    "PromptModel",
    "PromptNetwork",
    "check_refiner",
    "config_of",
    "encode_prompts",
    "packed",
    "refiner_for",
    "unpacked",
]


@dataclass
class PromptModel(FlowModel):
    """A text-to-image or text-to-video flow model: it takes prompts where FlowModel takes class
    numbers.

    A prompt is a text, or what `encode` returns for it.
    guidance_style: "halves": prompt and negative prompt are evaluated in one batch and combined by
        the scale; "embedded": the scale is an input of the network (FLUX.1-dev); "none": no
        guidance.
    pipe: the diffusers pipeline whose text encoders are used; None: prompts must be encoded.
    """

    guidance_style: GuidanceStyle = "halves"
    pipe: Any = None
    shift_of: Callable[[int], float] | None = field(
        default=None, init=False, repr=False, compare=False
    )
    """The shift for images of so many tokens, if the scheduler has a rule for it."""

    def resized(self, image_size: int | tuple[int, int]) -> FlowModel:
        raise ValueError(
            "resized is for models of classes: give image_size to from_pipeline, which knows the "
            f"pipeline's rules for it, got {image_size!r}"
        )

    def shift_at(self, height: int, width: int) -> float:
        """The shift of the time grid for latents of another size.

        By the scheduler's rule (FLUX), else in proportion to the sides.
        """
        H, W = self.latent_shape[-2:]
        if (height, width) == (H, W):
            return self.shift
        if self.shift_of is not None and isinstance(self.predictor, PromptNetwork):
            return self.shift_of(height * width // self.predictor.multiple**2)
        return super().shift_at(height, width)

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

        They are embeds, pooled if the network reads it, lengths if prompts may differ in it and, if
        guidance needs both halves, the same of the negative texts, named negative_...
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
        kind = self.kind
        names = set(kind.reads)
        if self.guided(guidance):
            names |= {f"negative_{name}" for name in names}
        missing = sorted(names - encoded.keys())
        if missing:
            raise ValueError(
                f"prompts must hold {', '.join(sorted(names))} for guidance={guidance}, and lack "
                f"{', '.join(missing)}"
            )
        conditions = {name: encoded[name].to(self.device, self.dtype) for name in sorted(names)}
        if kind.lengths:
            for name in sorted(name for name in names if name.endswith("embeds")):
                lengths = name.replace("embeds", "lengths")
                conditions[lengths] = _lengths(encoded.get(lengths), lengths, encoded[name])
        counts = {name: len(value) for name, value in conditions.items()}
        if len(set(counts.values())) > 1 or not min(counts.values()):
            raise ValueError(f"prompts must hold as many rows of each kind, got {counts}")
        if self.guidance_style == "embedded":
            conditions["embedded_guidance"] = torch.full(
                (counts["embeds"],), guidance, dtype=self.dtype, device=self.device
            )
        return conditions

    @property
    def multiple(self) -> int:
        return self.predictor.multiple if isinstance(self.predictor, PromptNetwork) else 1

    @property
    def kind(self) -> Kind:
        """How the network is called; a plain one reads embeds."""
        return self.predictor.kind if isinstance(self.predictor, PromptNetwork) else Kind()


def _lengths(given: Tensor | None, name: str, embeds: Tensor) -> Tensor:
    """Tokens of each prompt, (N,) int64 on the CPU, where shapes must be known; all by default."""
    if given is None:
        return torch.full((len(embeds),), embeds.shape[1], device="cpu")
    lengths = given.to("cpu", torch.int64)
    if lengths.ndim != 1 or (lengths < 1).any() or (lengths > embeds.shape[1]).any():
        raise ValueError(
            f"prompts: {name} must be whole numbers (N,) from 1 to {embeds.shape[1]}, got "
            f"{given.tolist()}"
        )
    return lengths


@torch.no_grad()
def encode_prompts(
    pipe: Any, texts: Sequence[str], negative: Sequence[str] | None, device: torch.device | str
) -> dict[str, Tensor]:
    """The encodings of texts by a pipeline.

    Names are embeds, pooled if its kind has it, lengths if prompts may differ in it; those of the
    negative texts begin with negative_.
    negative: None: no second half is encoded.
    """
    network = getattr(pipe, "transformer", None)
    kind = KINDS["UNet2DConditionModel"] if network is None else kind_of(network)
    return kind.encode(pipe, list(texts), None if negative is None else list(negative), device)
