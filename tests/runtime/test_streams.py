"""Closed, broken and narrow streams lose no work; a cluster's variables are read as they are."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from flowturbo.runtime import distributed
from flowturbo.runtime.streams import interactive, say


class Gone(io.StringIO):
    """Its reader has gone, or its disk is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def fileno(self) -> int:
        raise io.UnsupportedOperation


def test_a_reader_that_has_gone_is_no_failure_and_a_full_disk_is():
    assert say("text", Gone(BrokenPipeError(32, "Broken pipe")))
    assert not say("text", Gone(OSError(28, "No space left on device")))
    shown = io.StringIO()
    assert say("text", shown)
    assert shown.getvalue() == "text\n"


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_no_bar_without_a_terminal(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    assert not interactive()
    if stream is not None:
        stream.close()
        assert not interactive()


CHILD = """
import os, sys
from flowturbo.runtime.streams import interactive, prepare_streams, say
prepare_streams()
assert not interactive()
written = open("opened.txt", "w")
assert written.fileno() > 2
assert say("h\\xf6hle")
say("to nobody", sys.stderr)
written.write("done")
written.close()
"""


@pytest.mark.parametrize("redirected", ["<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", ""])
def test_a_process_without_streams_does_its_work(tmp_path, redirected):
    """Files that it opens get none of the streams' numbers."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = f'"{sys.executable}" -c "$CHILD" {redirected}'
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={**env, "CHILD": CHILD}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "opened.txt").read_text() == "done"
    if ">&-" not in redirected.replace("2>&-", ""):
        assert done.stdout == b"h\\xf6hle\n"


@pytest.mark.slow
def test_the_command_ends_well_when_nobody_reads(tmp_path):
    command = f'"{sys.executable}" -m flowturbo sample --labels 1 --out a.png 2>&- | true'
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("variables", "launched", "number"),
    [
        ({}, False, 0),
        ({"RANK": "", "WORLD_SIZE": ""}, False, 0),
        ({"RANK": "3"}, False, 0),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False, 0),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, True, 1),
    ],
)
def test_a_clusters_variables(monkeypatch, variables, launched, number):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.is_launched() is launched
    assert distributed.process_number() == number
    if not launched:
        with distributed.workers("cpu") as device:
            assert device.type == "cpu"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "one of 2 processes, but MASTER_ADDR and MASTER_PORT"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": ""},
            "but MASTER_PORT not: start with torchrun, or unset RANK",
        ),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK must be a number, got 'first'"),
    ],
)
def test_variables_that_lead_nowhere_are_named(monkeypatch, variables, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), distributed.workers("cpu"):
        pass
