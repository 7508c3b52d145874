"""The command `flowturbo`: subcommands over the library's functions, with no logic of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

import tyro

from ..data.emoji import Emoji, emoji
from ..data.encode import Encode, encode
from ..evaluation.fid import fidelity
from ..evaluation.fid_settings import Fidelity
from ..evaluation.latency import Bench, bench
from ..evaluation.quality import Evaluate, evaluate
from ..evaluation.velocity import InspectVelocity, inspect_velocity
from ..runtime.distributed import process_number
from ..runtime.streams import prepare_streams, say
from ..training.train import Distill, Train, distill, train
from ..tuning.settings import Tune
from ..tuning.tune import tune
from . import info
from .convert import Convert, run_convert
from .demo import Demo, run_demo
from .edit import Edit, Inpaint, run_edit
from .sample import Sample, Verify, run_sample, run_verify


@dataclass(frozen=True)
class Info:
    """Print versions, devices and kernel backends, to paste into a bug report.

    With --model, what a model is, with the names of its classes and of its plans.
    """

    model: str | None = None
    """A .pt, .pth or .safetensors file with SiT's keys, or a bundled model."""


COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "sample": (Sample, run_sample),
    "verify": (Verify, run_verify),
    "edit": (Edit, run_edit),
    "inpaint": (Inpaint, run_edit),
    "demo": (Demo, run_demo),
    "train": (Train, train),
    "distill": (Distill, distill),
    "evaluate": (Evaluate, evaluate),
    "fid": (Fidelity, fidelity),
    "inspect-velocity": (InspectVelocity, inspect_velocity),
    "encode": (Encode, encode),
    "emoji": (Emoji, emoji),
    "convert": (Convert, run_convert),
    "tune": (Tune, tune),
    "bench": (Bench, bench),
    "info": (Info, lambda s: info.report() if s.model is None else info.of_model(s.model)),
}
"""Each command: settings, whose fields are its flags, and a function, whose result is printed."""

POSITIONAL = {"encode"}
"""Commands whose required settings are positional arguments."""


def parse(words: Sequence[str]) -> Any:
    """Parse a command line into the settings of its command.

    SystemExit, with the reason on standard error, for a command line that does not parse.
    """
    words = list(words)
    if words[:1] == ["evaluate"] and any(word.split("=")[0] == "--metrics" for word in words):
        words[0] = "fid"  # its former name
    subcommands = []
    for name, (settings, _) in COMMANDS.items():
        kind: Any = settings
        if name in POSITIONAL:
            kind = tyro.conf.PositionalRequiredArgs[kind]  # type: ignore[misc]
        subcommands.append(Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)])
    choices: Any = Union[tuple(subcommands)]  # noqa: UP007  (made from a table)
    return tyro.cli(
        choices,
        prog="flowturbo",
        description=(
            "Few-call sampling of flow-matching models. Add --debug to any command for a "
            "full traceback."
        ),
        args=words,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    An error is printed in one line, with --debug it is raised.
    """
    prepare_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    settings = parse([word for word in words if word != "--debug"])
    run = next(run for kind, run in COMMANDS.values() if type(settings) is kind)
    try:
        result = run(settings)
    except KeyboardInterrupt:
        say("flowturbo: interrupted", sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        if debug:
            raise
        say(f"flowturbo: error: {error}", sys.stderr)
        return 2
    if result is not None and process_number() == 0 and not say(result):
        say("flowturbo: error: the work is done, but its result can't be printed", sys.stderr)
        return 2
    return 0


def run() -> None:
    sys.exit(main())


if __name__ == "__main__":
    run()
