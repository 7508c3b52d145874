"""Every command and every Python example in the documents runs, with small files in place of
published ones.

Each page is run from top to bottom in one folder, so later commands use what earlier ones wrote.
"""

from __future__ import annotations

import glob
import json
import os
import runpy
import shlex
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import DOCUMENTS, ROOT, Block, blocks, commands, flowturbo_words
from emoji_packages import package_files, use_npm, use_packages
from feature_network import RandomNetwork

from flowturbo.cli.main import main, parse
from flowturbo.evaluation import fid as fidelity
from flowturbo.tuning import cost, measure, tune

FASTER = {"--dtype": "float32"}  # matrix products in float16 are slow on a CPU
SMALLER = {
    "sample": {"--num-fid-samples": "6", "--batch-size": "2", "--image-size": "32", **FASTER},
    "inpaint": {"--image-size": "32"},
    "encode": {"--image-size 256": "16", "--image-size 512": "32", "--image-size 1024": "32"},
    "train": {
        "--steps": "2",
        "--decay-steps": "1",
        "--batch-size": "4",
        "--model SiT-XL/2": "SiT-S/8",
    },
    "distill": {"--steps": "2", "--batch-size": "4"},
    "bench": {"--batch-sizes": "1", "--model SiT-XL/2": "SiT-S/8", **FASTER},
    "fid": {"--images": "6", **FASTER},
    "tune": {"--budget-calls": "1", "--calls 3 4": "2", "--iterations": "1"},
    "solvers.py": {"--most": "2"},
    "bfloat16_cpu.py": {"--pairs": "1"},
    "caches.py": {"--images": "2"},
    "test_plans.py": {"--rivals": "ours", "--sizes": "64", "--batches": "1", "--plans": "H1R1"},
}
"""Values that replace those of a flag, or of a flag with these values, where a command has it."""

BRIEF = {"--benchmark-max-time": "0.01", "--benchmark-min-rounds": "1"}
ADDED = {
    "train": {"--steps": "2", "--batch-size": "4"},
    "distill": {"--steps": "2", "--batch-size": "4"},
    "bench": {"--repeats": "1"},
    "evaluate": {
        **{
            "--plans": "E1 H1R1",
            "--images": "40",
            "--batch-size": "20",
            "--classifier-steps": "20",
        },
        **{"--reference-images": "20", "--reference-plan": "H3"},
    },
    "fid": {"--batch-size": "3"},
    "inspect-velocity": {"--steps": "4", "--images": "4"},
    "tune": {
        **{"--calibration-images": "8", "--images": "20", "--batch-size": "10"},
        **{"--iterations": "1", "--refiner-steps": "0", "--reference-plan": "C9"},
    },
    "demo": {"--port": "0"},
    "growth.py": {"--batches": "1 2", "--counts": "1", "--sides": "8", "--repeats": "1"},
    "bfloat16_cpu.py": {"--models": "SiT-S/8"},
    "caches.py": {"--plans": "H1E1", "--fine": "E2"},
    "test_kernels.py": {"--providers": "auto", **BRIEF},
    "test_plans.py": {"--rivals": "ours", "--plans": "H1R1", **BRIEF},
}
"""Flags that are added if the command does not have them, for the same reason."""

NOT_RUN = {
    "pip install": "the tests run in the environment that it installs",
    "ln -s": "it is for ComfyUI's folder",
    "python -m venv": "the tests run in such an environment",
    ". .venv/bin/activate": "the tests run in such an environment",
    "python -m pytest": "it would run this test again",
    "python tests/fake_cuda/run.py": "it needs a CUDA build of torch; .ci/run runs it",
    "bash .ci/run": "it would run this test again",
    "ruff format": ".ci/run runs it",
    "ruff check": ".ci/run runs it",
    "mypy": ".ci/run runs it",
    "mkdocs build": ".ci/run runs it",
    "mkdocs serve": "it does not end by itself",
    "bash bench/gpu_check.sh": "it needs a GPU",
}
"""Commands that no test runs, by how they begin, and the reason."""

NO_GPU = {'.to("cuda")': '.to("cpu")', 'device="cuda"': 'device="cpu"'}
IN_PYTHON = {
    **({} if torch.cuda.is_available() else NO_GPU),
    "image_size=1024": "image_size=32",
    "image_size=(480, 832), frames=81": "image_size=32, frames=5",
    "B, T, D, heads = 8, 256, 1152, 16": "B, T, D, heads = 1, 16, 144, 2",
}
"""Text that is replaced in Python examples."""


def kind_of(command: list[str]) -> str:
    """The name of a command in the tables."""
    words = flowturbo_words(command)
    if words is None:
        return Path(next(word for word in command if word.endswith(".py"))).name
    return words[0]


def replaced(words: list[str], flag: str, values: str) -> list[str]:
    """The words with these values after the flag. flag: "--name", or "--name VALUES" to replace
    these values alone.
    """
    name, *before = flag.split()
    if name not in words:
        return words
    at = words.index(name) + 1
    end = next((i for i in range(at, len(words)) if words[i].startswith("--")), len(words))
    return [*words[:at], *values.split(), *words[end:]] if before in ([], words[at:end]) else words


def smaller(command: list[str]) -> list[str]:
    """The command as the tables change it."""
    kind, words = kind_of(command), command
    for flag, values in SMALLER.get(kind, {}).items():
        words = replaced(words, flag, values)
    for flag, values in ADDED.get(kind, {}).items():
        words = words if flag in words else [*words, flag, *values.split()]
    return words


def runs_bench(command: list[str]) -> bool:
    return command[0] == "python" and any(word.startswith("bench/") for word in command)


def why_not_run(command: list[str]) -> str | None:
    """The entry of NOT_RUN for the command, if any."""
    if flowturbo_words(command) is not None or runs_bench(command):
        return None
    text = " ".join(command)
    return next((known for known in NOT_RUN if text == known or text.startswith(f"{known} ")), None)


def run_command(command: list[str]) -> None:
    words = flowturbo_words(smaller(command)) if why_not_run(command) is None else None
    if words is not None:
        words = [name for word in words for name in expanded(word)]
        if "device" in vars(parse(words)):
            words += ["--device", "cpu"]
        if "--browser" in words:
            run_and_see_browser(words)
        else:
            assert main(words) == 0, shlex.join(command)
    elif runs_bench(command):
        run_bench(smaller(command)[1:])
    else:
        assert why_not_run(command), f"no test knows how to run: {shlex.join(command)}"


def expanded(word: str) -> list[str]:
    """The files that a pattern matches, as in a shell."""
    return sorted(glob.glob(word)) if "*" in word else [word]


def run_bench(arguments: list[str]) -> None:
    """A script of bench/ runs in this process, which has torch loaded; a suite in a new one."""
    if arguments[0] != "-m":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            patch.syspath_prepend("bench")
            runpy.run_path(arguments[0], run_name="__main__")
        return
    environment = {**OUTSIDE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )
    said = f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{said}"


def run_and_see_browser(words: list[str]) -> None:
    """The command opens its page in a browser."""
    opened = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webbrowser, "open", lambda address: opened.set())
        assert main(words) == 0
        assert opened.wait(timeout=30)


def stop_when_it_serves(patch: pytest.MonkeyPatch) -> None:
    """`flowturbo demo` ends as soon as its server accepts requests."""
    server = pytest.importorskip("uvicorn").Server
    run: Callable[..., None] = server.run

    def run_and_stop(self: Any, **options: Any) -> None:
        def stop() -> None:
            while not self.started:
                time.sleep(0.01)
            self.should_exit = True

        threading.Thread(target=stop, daemon=True).start()
        run(self, **options)
        assert self.started

    patch.setattr(server, "run", run_and_stop)


def make_tuning_brief(patch: pytest.MonkeyPatch) -> None:
    """What no flag of `flowturbo tune` and bench/solvers.py makes smaller."""
    batches = tune.calibration_batches
    small = {"calibration_images": 8, "reference_plan": "C9"}
    patch.setattr(tune, "calibration_batches", lambda s, *more: batches(replace(s, **small), *more))
    patch.setattr(measure, "train_classifier", partial(measure.train_classifier, steps=20))
    for module in (measure, cost):
        patch.setattr(module, "milliseconds", partial(module.milliseconds, turns=1))


def run_example(block: Block, page: Path, names: dict[str, Any]) -> None:
    text = block.text
    for before, after in IN_PYTHON.items():
        text = text.replace(before, after)
    exec(compile("\n" * (block.line - 1) + text, page, "exec"), names)


@pytest.fixture
def folder(tmp_path, monkeypatch, pipeline_folders, request) -> Path:
    """The working folder, with small files under published names. Inception is a small random
    network, and long work is short.
    """
    import stand_ins  # needs diffusers

    page = getattr(request.node, "callspec", None)
    text = page.params["page"].read_text() if page is not None else ""
    stand_ins.write(tmp_path, pipeline_folders, text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fidelity, "Inception", lambda weights, device: RandomNetwork())
    use_packages(monkeypatch, tmp_path / "npm", *package_files())
    use_npm(monkeypatch, tmp_path / "npm")
    stop_when_it_serves(monkeypatch)
    make_tuning_brief(monkeypatch)
    return tmp_path


RUNNABLE = [
    page
    for page in DOCUMENTS
    if any(block.language in ("bash", "python") for block in blocks(page.read_text()))
]


OUTSIDE = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
"""In a worker of xdist no benchmark would be taken."""
LONG = {"benchmarks.md", "reproduce.md", "search.md", "refiner.md", "speed.md"}
"""Pages whose commands take the longest."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if p.name in LONG else []) for p in RUNNABLE],
    ids=lambda page: page.name,
)
def test_every_command_and_example_runs(page, folder):
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page.read_text()):
        if block.language == "bash":
            for command in commands(block.text):
                run_command(command)
        elif block.language == "python":
            run_example(block, page, names)


def every_command() -> list[list[str]]:
    return [
        c
        for page in DOCUMENTS
        for b in blocks(page.read_text())
        if b.language == "bash"
        for c in commands(b.text)
    ]


def test_commands_are_found_in_every_form():
    bash = "pip install . && flowturbo info\ntorchrun -m flowturbo train --a \\\n  1  # why\n"
    loop = "for plan in H1 H2; do\n    flowturbo sample --plan $plan --out set-$plan\ndone\nls\n"
    read, other = blocks(f"```bash\n{bash}```\n\n```python\nflowturbo x\n```\n")
    assert (read.line, other.language) == (2, "python")
    found = list(commands(read.text + loop))
    assert [flowturbo_words(command) for command in found] == [
        None,
        ["info"],
        ["train", "--a", "1"],
        *(["sample", "--plan", plan, "--out", f"set-{plan}"] for plan in ("H1", "H2")),
        None,
    ]


@pytest.mark.parametrize(
    "command, expected",
    [
        (
            "flowturbo sample --batch-size 50 --num-fid-samples 50000 --out x",
            "flowturbo sample --batch-size 2 --num-fid-samples 6 --out x",
        ),
        (
            "flowturbo bench --batch-sizes 1 8 64 --plans H1 H8",
            "flowturbo bench --batch-sizes 1 --plans H1 H8 --repeats 1",
        ),
        (
            "flowturbo encode images latents --image-size 256",
            "flowturbo encode images latents --image-size 16",
        ),
        (
            "python bench/test_plans.py --rivals 'ours eager' --plans H8",
            "python bench/test_plans.py --rivals ours --plans H1R1",
        ),
    ],
)
def test_commands_are_made_smaller_and_no_more(command, expected):
    assert shlex.join(smaller(shlex.split(command))).startswith(expected)


def test_every_command_can_be_read():
    """The command line accepts the words as they are written."""
    found = [
        [w for word in words for w in expanded(word)]
        for words in map(flowturbo_words, every_command())
        if words is not None
    ]
    assert len(found) > 60
    for words in found:
        try:
            parse(words)
        except SystemExit as refusal:
            pytest.fail(f"flowturbo {shlex.join(words)} is refused ({refusal})")


def test_all_that_the_tables_name_is_in_use():
    texts = "".join(page.read_text() for page in DOCUMENTS)
    assert not [
        known
        for known in NOT_RUN
        if known not in {why_not_run(command) for command in every_command()}
    ]
    assert not [text for text in IN_PYTHON if text not in texts]
    used = [(kind_of(c), shlex.join(c)) for c in every_command() if why_not_run(c) is None]
    for kind, flags in SMALLER.items():
        assert not [
            flag for flag in flags if not any(kind == k and flag in text for k, text in used)
        ], kind
    assert not ADDED.keys() - {kind for kind, _ in used}


@pytest.mark.slow
def test_under_torchrun_the_documented_command_makes_the_whole_set(folder):
    """Two processes; the other tests run such commands as one process."""
    page = (ROOT / "docs" / "image-sets.md").read_text()
    command = next(
        c
        for b in blocks(page)
        if b.language == "bash"
        for c in commands(b.text)
        if c[0] == "torchrun"
    )
    words = flowturbo_words(smaller(command))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "flowturbo",
    ]
    environment = {**OUTSIDE, "OMP_NUM_THREADS": "1"}
    # 6 images in shards of 4: one shard for each process.
    subprocess.run(
        [*launch, *words, "--shard-size", "4", "--batch-size", "4", "--device", "cpu"],
        check=True,
        env=environment,
        timeout=300,
    )
    assert main(["verify", "samples"]) == 0
    assert json.loads((folder / "samples" / "manifest.json").read_text())["shape"] == [6, 16, 16, 3]
