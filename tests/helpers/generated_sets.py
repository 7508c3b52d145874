"""A small set of images in shards, what its folder holds, and the same command in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from paths import ROOT

import flowturbo as ft
from flowturbo.sampling.generate import generate

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
LABELS = [i % 10 for i in range(22)]
OPTIONS: dict[str, Any] = dict(guidance=1.5, seed=3, batch_size=4, shard_size=8)


def make(model: ft.FlowModel, out: Path, **changes: Any) -> dict[str, Any]:
    """22 images in shards of 8, 8 and 6."""
    options = {"plan": "E1", "labels": LABELS, **OPTIONS, **changes}
    return generate(model, options.pop("plan"), options.pop("labels"), out, **options)


def contents(out: Path) -> dict[str, bytes]:
    """All that a person sees in a folder."""
    return {
        path.name: path.read_bytes()
        for path in sorted(out.iterdir())
        if not path.name.startswith(".")
    }


def inodes(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in out.glob("images-*.npz")}


def hidden(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob(".*"))


class Killed(BaseException):
    pass


NUM = 90
WORDS = (
    f"sample --model digits --num-fid-samples {NUM} --plan H1P2 --batch-size 4 --shard-size 8 "
    "--seed 5 --device cpu"
).split()


def finish(digits: ft.FlowModel, out: Path) -> None:
    """`WORDS` in this process."""
    about = {
        "model": "digits",
        "refiner": None,
        "vae": None,
        "label_rule": "cycle",
        "labels": "all",
    }
    generate(
        digits,
        "H1P2",
        [i % 10 for i in range(NUM)],
        out,
        guidance=1.5,
        seed=5,
        batch_size=4,
        shard_size=8,
        about=about,
    )


def torchrun(out: Path, **environment: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "flowturbo",
        *WORDS,
    ]
    return subprocess.Popen(
        [*command, "--out", str(out)],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
