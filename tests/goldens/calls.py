"""Calls of the library and its command, and digests of what they give, to tell that a change of the
code changed no result.

python tests/goldens/calls.py     # writes calls.json anew: only after a change that is meant to
change results
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import flowturbo as ft
from flowturbo.tuning import measure, tune

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "helpers"))
from tiny import HEAD_DIM_72, tiny_model  # noqa: E402

RECORD = HERE / "calls.json"
LABELS = [3, 1, 4, 1, 5, 9, 2]
CALLS: dict[str, Callable[[], Any]] = {}


def call(function: Callable[[], Any]) -> Callable[[], Any]:
    CALLS[function.__name__] = function
    return function


def command(*words: object) -> None:
    from flowturbo.cli.main import main

    words = tuple(str(word) for word in words)
    assert main([*words, *([] if words[0] == "verify" else ["--device", "cpu"])]) == 0, words


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def digits(plan: str, **options: Any) -> torch.Tensor:
    return ft.sample(
        ft.load("digits", device="cpu"),
        plan,
        **{"labels": LABELS, "guidance": 1.5, "seed": 3, **options},
    )


def digit_files(folder: str, **options: Any) -> list[Path]:
    Path(folder).mkdir(parents=True)
    files = [Path(folder) / f"{i}.png" for i in range(4)]
    for path, image in zip(files, digits("H2", output="uint8", **options), strict=False):
        Image.fromarray(image.numpy()).save(path)
    return files


@call
def sample_the_papers_plan() -> Any:
    return digits("H1P5R3")


@call
def sample_without_guidance() -> Any:
    return digits("E3A4B2C2", guidance=1.0)


@call
def sample_in_batches_to_pixels() -> Any:
    return digits("H1P2S1", batch_size=3, output="uint8")


@call
def sample_with_guidance_in_an_interval() -> Any:
    return digits(ft.Plan.parse("H2P2R2", guidance_interval=(0.2, 0.8)))


@call
def sample_on_a_shifted_grid() -> Any:
    return digits(ft.Plan.parse("H1P4", shift=3.0))


@call
def sample_four_channels() -> Any:
    return ft.sample(tiny_model(), "H2P2R2", LABELS, guidance=2.0, seed=0)


@call
def sample_in_float64_with_heads_of_72() -> Any:
    model = tiny_model(HEAD_DIM_72, dtype=torch.float64)
    return ft.sample(model, "H1P1R1", LABELS, guidance=2.0, guidance_channels=4, seed=0)


@call
def sample_a_function() -> Any:
    return ft.sample(
        lambda x, t, rate: rate * x.sin() - t, "H1P3", noise=ft.noise((2, 3), 5, range(4)), rate=0.7
    )


@call
def edit() -> Any:
    model = ft.load("digits", device="cpu")
    return ft.edit(
        model, "H4", digits("H2", output="uint8"), LABELS[::-1], strength=0.6, guidance=2.0, seed=1
    )


@call
def inpaint() -> Any:
    model, images = ft.load("digits", device="cpu"), digits("H2", output="uint8")
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    return ft.inpaint(model, "H4", images, mask, LABELS, guidance=2.0, seed=1)


@call
def a_refiner_of_random_weights() -> Any:
    model = tiny_model()
    x, v = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.refiner(x, torch.full((2,), 0.3), torch.tensor([1, 2]), v)


@call
def plans() -> Any:
    texts = "H1P5R3", "E2A3B2C4", "H8P9R5"
    return [[str(ft.Plan.parse(text)), str(ft.Plan.parse(text).cost)] for text in texts]


@call
def command_sample() -> Any:
    command("sample", "--model", "digits", "--plan", "H1P5R3", "--out", "a.png", "--seed", 4)
    return pixels("a.png")


@call
def command_sample_a_set() -> Any:
    command(
        "sample",
        "--model",
        "digits",
        "--plan",
        "H1P2R1",
        "--num",
        25,
        "--batch-size",
        5,
        "--out",
        "set",
        "--label-rule",
        "random",
    )
    command("verify", "set", "--npz", "set.npz")
    with np.load("set.npz") as arrays:
        return dict(arrays)


@call
def command_edit() -> Any:
    command(
        "edit",
        *digit_files("images"),
        "--model",
        "digits",
        "--plan",
        "H3R1",
        "--labels",
        7,
        "--out",
        "edited.png",
    )
    return pixels("edited.png")


@call
def command_train() -> Any:
    sizes = ["--model", "custom", "--hidden", 48, "--depth", 2, "--heads", 2]
    command(
        "train",
        "--data",
        "digits",
        *sizes,
        "--steps",
        4,
        "--batch-size",
        8,
        "--out",
        "run",
        "--warmup",
        2,
        "--clip",
        1,
    )
    return load_file("run/model.safetensors")


@call
def command_distill() -> Any:
    command(
        "distill",
        "--data",
        "digits",
        "--teacher",
        "digits",
        "--steps",
        4,
        "--batch-size",
        8,
        "--out",
        "run",
    )
    return load_file("run/model.safetensors")


@call
def command_evaluate() -> Any:
    small = [
        "--images",
        40,
        "--batch-size",
        20,
        "--classifier-steps",
        20,
        "--reference-images",
        20,
        "--reference-plan",
        "H3",
    ]
    command("evaluate", "--plans", "E1", "H1R1", *small, "--out", "run")
    report = json.loads(Path("run/quality.json").read_text(encoding="utf-8"))
    return without_times(report.get("rows", report))


@call
def command_tune() -> Any:
    small = "--calibration-images 8 --images 20 --batch-size 10 --iterations 1 --reference-plan C9"
    words = ["--budget-calls", 1, "--refiner-steps", 0, *small.split(), "--out", "run"]
    with contextlib.ExitStack() as stack:
        # Neither times nor Fréchet distances are compared.
        costs = dict.fromkeys([*"EHPABCL", "fixed"], 1.0)
        brief = partial(measure.train_classifier, steps=20)
        for module, name, value in (
            (tune, "step_costs", lambda *_: costs),
            (measure, "milliseconds", partial(measure.milliseconds, turns=1)),
            (measure, "train_classifier", brief),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        command("tune", *words)
    rows = json.loads(Path("run/tuning.json").read_text(encoding="utf-8"))["rows"]
    return [[row[name] for name in ("plan", "how", "predictor_calls", "rms")] for row in rows]


@call
def command_encode() -> Any:
    digit_files("images/one")
    digit_files("images/two", seed=4)
    command("encode", "images", "shards", "--vae", "pixels", "--image-size", 8, "--batch-size", 4)
    return {path.name: load_file(path) for path in sorted(Path("shards").glob("*.safetensors"))}


def without_times(value: Any) -> Any:
    """What a report says but for measured times, machines and versions."""
    names = (
        "ms",
        "seconds",
        "time",
        "version",
        "device",
        "host",
        "torch",
        "digest",
        "circumstances",
        "provenance",
        "python",
    )
    if isinstance(value, dict):
        return {
            k: without_times(v)
            for k, v in value.items()
            if not any(name in str(k).lower() for name in names)
        }
    return [without_times(v) for v in value] if isinstance(value, list) else value


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for key in sorted(value) for part in (key, *flat(value[key]))]
    return (
        [part for item in value for part in flat(item)]
        if isinstance(value, list | tuple)
        else [value]
    )


def described(value: Any) -> dict[str, Any]:
    """Of a result: its digest, and the size of all its numbers, for machines that round
    otherwise.
    """
    digest, total = hashlib.sha256(), 0.0
    for part in flat(value):
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
            total += float(np.abs(part.astype(np.float64)).sum())
        else:
            digest.update(repr(part).encode())
            total += abs(part) if isinstance(part, int | float) else 0.0
    return {"digest": digest.hexdigest(), "size": total}


def machine() -> dict[str, str]:
    """On which the digests depend: other processors and versions round sums otherwise."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": cpu,
        "processor": processor(),
        "machine": platform.machine(),
    }


def processor() -> str:
    """Maker, family and model of the processor, by which torch's libraries choose their kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    return " ".join(found.get(key, "") for key in ("vendor_id", "cpu family", "model")).strip()


def result(name: str) -> dict[str, Any]:
    """In a folder of its own, on one thread, whose number sums depend on."""
    before, here = torch.get_num_threads(), Path.cwd()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            return described(CALLS[name]())
    finally:
        os.chdir(here)
        torch.set_num_threads(before)


def records() -> list[dict[str, Any]]:
    """What was recorded, by machine."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


if __name__ == "__main__":
    record = {"machine": machine(), "results": {name: result(name) for name in CALLS}}
    others = [one for one in records() if one["machine"] != record["machine"]]
    RECORD.write_text(json.dumps([*others, record], indent=1) + "\n", encoding="utf-8")
