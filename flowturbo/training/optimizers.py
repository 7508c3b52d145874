"""The optimisers of a training run, as one: AdamW, and Muon for the matrices of the blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .settings import Settings


class Optimizers:
    """AdamW for all weights or, with settings.optimizer "muon", for those that Muon does not take.

    Muon (Jordan et al. 2024) is for matrices of hidden layers: those of the blocks, but not the
    layers that make modulations, whose input is one row an image. Its updates are scaled to the
    size of AdamW's. ValueError for "muon" with a torch that has none, or a network without such
    matrices.
    """

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        self.settings = settings
        chosen = matrices_of_blocks(network) if settings.optimizer == "muon" else []
        own = {id(weight) for weight in chosen}
        rest = [weight for weight in network.parameters() if id(weight) not in own]
        decay = settings.weight_decay
        self.parts: dict[str, tuple[torch.optim.Optimizer, float]] = {
            # The names are those of the tensors in a run's state.
            "optimizer": (
                torch.optim.AdamW(
                    rest, lr=settings.lr, weight_decay=decay, betas=(0.9, settings.beta2)
                ),
                settings.lr,
            )
        }
        if settings.optimizer == "muon":
            self.parts["muon"] = _muon(chosen, settings.muon_lr, decay), settings.muon_lr

    def step(self, step: int) -> None:
        """Update the weights by their gradients, which are then gone; step: its number."""
        factor = self.settings.schedule_factor(step)
        for optimizer, rate in self.parts.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All tensors of the state, by name."""
        return {
            f"{name}.{index}.{entry}": value
            for name, (optimizer, _) in self.parts.items()
            for index, entries in optimizer.state_dict()["state"].items()
            for entry, value in entries.items()
        }

    def load(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """parts: name of an optimiser -> "index.entry" -> the tensor, as `state` names them."""
        for name, (optimizer, _) in self.parts.items():
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in parts.get(name, {}).items():
                index, _, entry = key.partition(".")
                moments.setdefault(int(index), {})[entry] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


_MODULATES = re.compile(r"adaln|norm|modulation|time_emb|(^|[._])mod([._]|$)")
"""Names of layers that make modulations, in SiT's blocks and in those of diffusers' networks."""


def matrices_of_blocks(network: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon takes: of linear layers in a list of blocks, but for modulations."""
    found: dict[int, nn.Parameter] = {}
    for blocks in network.modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        for name, layer in blocks.named_modules():
            if isinstance(layer, nn.Linear) and not _MODULATES.search(name.lower()):
                weight = cast(nn.Parameter, layer.weight)
                found[id(weight)] = weight
    return list(found.values())


def _muon(weights: list[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer 'muon' needs torch 2.9 or later, this is {torch.__version__}")
    if not weights:
        raise ValueError("optimizer 'muon' is for the matrices of blocks, and the network has none")
    return torch.optim.Muon(
        weights, lr=rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
