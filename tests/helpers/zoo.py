"""Every flow-matching pipeline of the installed diffusers, tiny and random, with one call of each.

The builders are in zoo_<family>.py, each with a dictionary CASES: class name -> builder.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SCHEDULERS = re.compile("Flow|SCM|UniPC|DPMSolver|Helios|LTXEuler|SchedulerMixin")
"""Names of schedulers for flow matching, or that have flow matching among their options. Pipelines
that take DDIM as well predict noise.
"""

# To parse these files as a whole takes ten seconds.
_CLASS = re.compile(r"^class (\w+Pipeline)\(([^)]*)\):\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
_INIT = re.compile(r"^    def __init__\((.*?)\)(?: -> None)?:$", re.MULTILINE | re.DOTALL)

NOT_FLOW = {
    "PixArtAlphaPipeline": "its network predicts noise",
    "StableAudioPipeline": "its network predicts v of a variance-preserving process",
}
"""Pipelines with such a scheduler that do no flow matching, and what they do."""

UNTRIED: dict[str, str] = {}
"""Pipelines that can't be built here, and why."""


@dataclass
class Case:
    """A pipeline, and the arguments of one call, which returns latents or whatever it decodes.

    arguments: without the number of steps and the generator.
    steps: what the pipeline calls the number of steps; None: it has no such argument.
    note: of the table, such as an option that was needed.
    """

    pipe: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    steps: str | None = "num_inference_steps"
    note: str = ""


def random_(module: nn.Module, seed: int) -> Any:
    """Give a module weights with a gain of about one, so that its output depends on every input.

    Returns the module, in eval mode. Scales of norms are about 1, biases and the like about 0.05.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value = 0.7 / parameter[0].numel() ** 0.5 * noise
        else:
            value = float(name.endswith("weight")) + 0.05 * noise
        parameter.data = value.to(parameter.dtype)
    return module.requires_grad_(False).eval()


def assembled(name: str, **components: Any) -> Any:
    """A pipeline of this class, without a progress bar. Components that aren't given are None."""
    import diffusers

    kind = getattr(diffusers, name)
    wanted = inspect.signature(kind.__init__).parameters
    missing = [n for n, p in wanted.items() if p.default is p.empty and n != "self"]
    pipe = kind(**dict.fromkeys(missing) | components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux2_vae(*widths: int) -> Any:
    """FLUX.2's autoencoder with 4 channels and levels of these widths."""
    import diffusers

    return diffusers.AutoencoderKLFlux2(
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
    )


def picture(size: int = 32, seed: int = 0) -> Any:
    """A PIL image of noise."""
    from PIL import Image

    pixels = torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@functools.cache
def builders() -> dict[str, Callable[[], Case]]:
    """Class name -> builder, of all families."""
    found: dict[str, Callable[[], Case]] = {}
    for path in sorted(Path(__file__).parent.glob("zoo_*.py")):
        cases = importlib.import_module(path.stem).CASES
        twice = found.keys() & cases.keys()
        assert not twice, f"{path.name} builds again: {', '.join(twice)}"
        found |= cases
    return found


@functools.cache
def flow_pipelines() -> dict[str, str]:
    """Class name -> folder, of the pipelines whose __init__ takes a scheduler for flow matching.

    They are found in diffusers' source, so that a new one can't be missed.
    """
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    root, taken = Path(spec.origin).parent / "pipelines", dict[str, str]()
    heirs: list[tuple[str, str, str]] = []
    for path in sorted(root.rglob("pipeline*.py")):
        folder = path.relative_to(root).parts[0]
        if folder in ("deprecated", path.name):
            continue
        for name, bases, body in _CLASS.findall(path.read_text(encoding="utf-8")):
            if (schedulers := _schedulers(body)) is None:
                heirs.append((name, bases, folder))
            elif _SCHEDULERS.search(schedulers) and "DDIM" not in schedulers:
                taken[name] = folder
    for name, bases, folder in heirs:  # without an __init__ of their own
        if taken.keys() & set(re.findall(r"\w+", bases)):
            taken[name] = folder
    assert taken.keys() >= NOT_FLOW.keys()
    kept = {name: folder for name, folder in taken.items() if name not in NOT_FLOW}
    return dict(sorted(kept.items(), key=lambda item: (item[1], item[0])))


def _schedulers(body: str) -> str | None:
    """The types of the schedulers that a class's __init__ takes; None if it has no __init__.

    Of one without a type the class's docstring tells.
    """
    found = _INIT.search(body)
    if found is None:
        return None
    head = ast.parse(f"def f({found[1]}): ...").body[0]
    assert isinstance(head, ast.FunctionDef)
    return " ".join(
        ast.unparse(a.annotation) if a.annotation else body[: found.start()]
        for a in [*head.args.args, *head.args.kwonlyargs]
        if "scheduler" in a.arg
    )
