"""Digests of a model's parts as they are in memory, whatever files they came from."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from ..models.sit import SiT
from ..models.text_to_image import PromptModel, PromptNetwork, config_of


def digest(part: object) -> str | None:
    """SHA-256 of a network or VAE as it is in memory, whatever file it came from."""
    if part is None:
        return None
    hashed = hashlib.sha256(
        (
            f"{type(part).__name__} {getattr(part, 'scale', None)} {getattr(part, 'shift', None)}"
        ).encode()
    )
    network = part if isinstance(part, nn.Module) else getattr(part, "network", None)
    if isinstance(network, nn.Module):
        hashed.update("".join(map(_config, network.modules())).encode())
        for name, value in sorted(network.state_dict().items()):
            hashed.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            hashed.update(value.detach().reshape(-1).view(torch.uint8).cpu().numpy())
    return hashed.hexdigest()


def _config(module: nn.Module) -> str:
    """What determines a network besides its weights, without file names.

    For networks of ours and of diffusers; "" for other modules.
    """
    if isinstance(module, SiT):
        return str(module.config).replace(", sides=()", "")  # as before there were any
    if isinstance(module, PromptNetwork):
        return str(sorted(config_of(module.module).items())) + str(getattr(module, "boundary", ""))
    return ""


def text_digests(model: PromptModel) -> dict[str, str | None]:
    """SHA-256 of each text encoder and each tokenizer's vocabulary."""
    digests: dict[str, str | None] = {}
    for name, part in sorted(model.pipe.components.items()):
        if name.startswith("text_encoder"):
            digests[name] = digest(part)
        elif name.startswith("tokenizer") and part is not None:
            digests[name] = hashlib.sha256(
                str(sorted(part.get_vocab().items())).encode()
            ).hexdigest()
    return digests
