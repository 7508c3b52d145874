"""Standard streams that may be closed, broken or unable to show a character.

No work is lost for them: what was done is done, and what can't be shown is left out.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any


def prepare_streams() -> None:
    """For a command: open closed streams on nothing, and escape characters that can't be shown.

    A daemon, pythonw or `2>&-` starts a command without them. Their numbers must not be given to
    files that are opened later, into which libraries in C would write their messages.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, most often this one
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            # Kept open for the life of the process, as Python keeps its own.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and hasattr(stream, "reconfigure"):
            with suppress(ValueError, OSError):
                stream.reconfigure(errors="backslashreplace")


def interactive() -> bool:
    """Whether standard error is a terminal, on which a bar of progress is of use."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except (ValueError, OSError):  # closed meanwhile
        return False


def say(text: object, stream: Any = None) -> bool:
    """Print a line to standard output, or another stream -> whether it could be written.

    A reader that has gone, as in `flowturbo info | head -1`, is no failure.
    """
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        _drop(stream)
    except (OSError, ValueError):
        _drop(stream)
        return False
    return True


def _drop(stream: Any) -> None:
    """Send what is left in the stream's buffer to nothing, or Python would fail at its exit."""
    with suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
