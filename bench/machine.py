"""The machine that is measured: python bench/machine.py prints four lines for bench/gpu_check.sh.

The device's name, the same as a file's name, its architecture as nvcc calls it, and as JSON all
that figures depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = "FAKE_CUDA" in os.environ
"""Whether the device only acts as one: kernels do nothing, so that no value may be compared and no
time means anything.
"""


def device_name() -> str:
    """The GPU's, or "cpu"; on a stand-in it says so, wherever the name is shown."""
    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name() + (
        " (stand-in: no figure means anything)" if STAND_IN else ""
    )


def file_name(device: str) -> str:
    """Lower-case letters, digits and '-' only: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major >= 9 else "")


def facts() -> dict[str, str]:
    return {
        "device": device_name(),
        "code": code(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        **{
            name: found
            for name in ("triton", "cupy-cuda13x", "cupy-cuda12x")
            if (found := _version(name))
        },
        **_driver(),
    }


FOLDERS = ("bench", "csrc", "flowturbo", "flowturbo_kernels")
SUFFIXES = (".py", ".sh", ".cu", ".cuh", ".cpp", ".h")
RESULTS = "bench/results"


def code() -> str:
    """The commit, with a digest of the sources where they are not the commit's or there is none.
    What the benchmarks write beside them is no source.
    """
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in SUFFIXES and not name.startswith(f"{RESULTS}/"):
                digest.update(name.encode() + path.read_bytes())
    sources = f"sources {digest.hexdigest()[:10]}"
    git = "git", "-C", str(ROOT)
    commit = _said(*git, "rev-parse", "--short=10", "HEAD")
    if not commit:
        return sources
    patterns = [f"{folder}/*{suffix}" for folder in FOLDERS for suffix in SUFFIXES]
    status = *git, "status", "--porcelain", "--untracked-files=all", "--"
    changed = _said(*status, *patterns, f":(exclude){RESULTS}")
    return f"commit {commit}" + (f", changed: {sources}" if changed else "")


def _driver() -> dict[str, str]:
    names = {
        "driver_version": "driver",
        "power.limit": "power limit",
        "clocks.max.sm": "highest SM clock",
        "clocks.sm": "SM clock before",
    }
    line = (
        ""
        if STAND_IN
        else _said("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    )
    return (
        dict(zip(names.values(), (v.strip() for v in line.split("\n")[0].split(",")), strict=False))
        if line
        else {}
    )


def _said(*command: str) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} (CUDA of its build: {torch.version.cuda or 'none'}) finds "
            "no CUDA device"
        )
    print(device_name(), file_name(device_name()), architecture(), json.dumps(facts()), sep="\n")
