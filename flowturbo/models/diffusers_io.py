"""Networks as diffusers' save_pretrained writes them: folders or hub names, safetensors only, with
every weight there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..storage.files import CheckpointError, save_tensors, write_text

WEIGHTS = "diffusion_pytorch_model.safetensors"


def is_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name means a place here rather than one on the hub: a mistyped path must not become
    a question to the network.
    """
    path = Path(name)
    if (
        not isinstance(name, str)
        or name.startswith((".", "/", "~"))
        or path.is_absolute()
        or path.exists()
    ):
        return True
    return path.parent.exists()


def read_pretrained(
    role: str, kinds: Mapping[str, Any], name: str | os.PathLike[str], source: str, **where: Any
) -> Any:
    """A network in float32, of the one of `kinds` that its configuration names, all of whose
    weights come from its file.

    role: what messages call it. kinds: classes by name; a configuration that names none is of the
        first. Raises CheckpointError.
    """
    default = next(iter(kinds))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # diffusers asks the hub's library in a way that this calls outdated
            what = kinds[default].load_config(source, **where).get("_class_name", default)
        if what not in kinds:
            raise ValueError(f"it is a model of the kind {what}, not one of {', '.join(kinds)}")
        network, found = kinds[what].from_pretrained(
            source,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            **where,
        )
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # OSError, ValueError, RuntimeError, KeyError: whatever its readers stumble on
        raise CheckpointError(f"{role} {str(name)!r} can't be read: {first_line(error)}") from error
    # Weights that the file lacks would stay random, with no more than a line in the log.
    for verb, keys in (
        ("lacks", found["missing_keys"]),
        ("has no place for", found["unexpected_keys"]),
    ):
        if keys:
            some = ", ".join(sorted(keys)[:4])
            raise CheckpointError(
                f"{role} {str(name)!r} is no {type(network).__name__} of its own configuration: "
                f"it {verb} {some} ({len(keys)} keys)"
            )
    return network


def write_pretrained(folder: Path, network: Any, provenance: Mapping[str, Any]) -> Path:
    """What read_pretrained and from_pretrained read: config.json and the weights, each whole or
    absent -> path of the weights.
    """
    weights = folder / WEIGHTS
    write_text(folder / "config.json", network.to_json_string())
    save_tensors(weights, network.state_dict(), provenance)
    return weights


_HUB_TIMEOUT = 10.0


def ask_hub(role: str, name: str, repository: str) -> None:
    """One question with a time limit: diffusers itself would try for half a minute before it said,
    in other words, that there is no network. ValueError where there is none, or no such repository
    that may be read."""
    import huggingface_hub

    try:
        huggingface_hub.model_info(repository, timeout=_HUB_TIMEOUT)
    except Exception as error:  # of the network, of the name, or of the right to read it
        raise ValueError(
            f"{role} {name!r} is no folder here, was not downloaded before, and can't be had from "
            f"the hub: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
