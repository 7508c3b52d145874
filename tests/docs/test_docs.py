"""The documents are right: every command and every example in them runs, on small files in the
place of published ones.

What a page says is run in its order, in one folder, so that later commands use what earlier ones
wrote.
"""

from __future__ import annotations

import glob
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import DOCUMENTS, ROOT, Block, blocks, commands, flowturbo_words
from feature_network import RandomNetwork

from flowturbo.cli.main import main, parse
from flowturbo.evaluation import fid as fidelity

FASTER = {"--dtype": "float32"}  # a CPU has no fast products in float16
SMALLER = {
    "sample": {"--num-fid-samples": "6", "--batch-size": "2", "--image-size": "32", **FASTER},
    "inpaint": {"--image-size": "32"},
    "encode": {"--image-size 256": "16", "--image-size 512": "32", "--image-size 1024": "32"},
    "train": {"--steps": "2", "--batch-size": "4", "--model SiT-XL/2": "SiT-S/8"},
    "distill": {"--steps": "2", "--batch-size": "4"},
    "bench": {"--batch-sizes": "1", "--model SiT-XL/2": "SiT-S/8", **FASTER},
    "evaluate --metrics": {"--images": "6", **FASTER},
    "tune": {"--budget-calls": "1"},
    "test_plans.py": {"--rivals": "ours", "--sizes": "64", "--batches": "1", "--plans": "H1R1"},
}
"""What is made smaller where it stands in a command: the values of a flag, or of a flag with these
values.
"""

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
    "evaluate --metrics": {"--batch-size": "3"},
    "inspect-velocity": {"--steps": "4", "--images": "4"},
    "tune": {
        **{"--calibration-images": "8", "--images": "20", "--batch-size": "10"},
        **{"--iterations": "1", "--refiner-steps": "0", "--reference-plan": "C9"},
    },
    "solvers.py": {"--most": "2"},
    "test_kernels.py": BRIEF,
    "test_plans.py": {"--rivals": "ours", "--plans": "H1R1", **BRIEF},
}
"""What is added to a command that says nothing of it, to the same end."""

NOT_RUN = {
    "pip install": "the tests run in what it installs",
    "python -m venv": "the tests run in what it makes",
    ". .venv/bin/activate": "the tests run in what it enters",
    "python -m pytest": "it runs this test",
    "python tests/fake_cuda/run.py": "it needs a CUDA build of torch: .ci/run runs it",
    "bash .ci/run": "it runs this test",
    "ruff format": ".ci/run runs it",
    "ruff check": ".ci/run runs it",
    "mypy": ".ci/run runs it",
    "mkdocs build": ".ci/run runs it",
    "mkdocs serve": "it serves pages until it is stopped",
    "bash bench/gpu_check.sh": "it needs a GPU",
}
"""Beginnings of the commands that no test runs, and why."""

NO_GPU = {'.to("cuda")': '.to("cpu")', 'device="cuda"': 'device="cpu"'}
IN_PYTHON = {
    **({} if torch.cuda.is_available() else NO_GPU),
    "image_size=1024": "image_size=32",
    "B, T, D, heads = 8, 256, 1152, 16": "B, T, D, heads = 1, 16, 144, 2",
}
"""What is changed in examples."""


def kind_of(command: list[str]) -> str:
    """By which the tables name a command."""
    words = flowturbo_words(command)
    if words is None:
        return Path(next(word for word in command if word.endswith(".py"))).name
    return "evaluate --metrics" if words[0] == "evaluate" and "--metrics" in words else words[0]


def replaced(words: list[str], flag: str, values: str) -> list[str]:
    """The words with these values after the flag, if it is there; of a flag with a value, if that
    value follows.
    """
    name, *before = flag.split()
    if name not in words:
        return words
    at = words.index(name) + 1
    end = next((i for i in range(at, len(words)) if words[i].startswith("--")), len(words))
    return [*words[:at], *values.split(), *words[end:]] if before in ([], words[at:end]) else words


def smaller(command: list[str]) -> list[str]:
    """The command with small numbers."""
    kind, words = kind_of(command), command
    for flag, values in SMALLER.get(kind, {}).items():
        words = replaced(words, flag, values)
    for flag, values in ADDED.get(kind, {}).items():
        words = words if flag in words else [*words, flag, *values.split()]
    return words


def runs_bench(command: list[str]) -> bool:
    return command[0] == "python" and any(word.startswith("bench/") for word in command)


def why_not_run(command: list[str]) -> str | None:
    """The beginning in NOT_RUN that the command has."""
    if flowturbo_words(command) is not None or runs_bench(command):
        return None
    text = " ".join(command)
    return next((known for known in NOT_RUN if text == known or text.startswith(f"{known} ")), None)


def run_command(command: list[str]) -> None:
    if command[:2] == ["flowturbo", "demo"]:
        begin_and_end_demo(command[1:])
    elif flowturbo_words(command) is not None:
        words = [
            found for word in flowturbo_words(smaller(command)) or [] for found in expanded(word)
        ]
        if "device" in vars(parse(words)):
            words += ["--device", "cpu"]
        assert main(words) == 0, shlex.join(command)
    elif runs_bench(command):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *smaller(command)[1:]], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, (
            f"{shlex.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    else:
        assert why_not_run(command), f"no test knows how to run: {shlex.join(command)}"


def expanded(word: str) -> list[str]:
    """As the shell does with names of files."""
    return sorted(glob.glob(word)) if "*" in word else [word]


def begin_and_end_demo(words: list[str]) -> None:
    """The command serves until Ctrl-C: here, until it has said where. A browser that it opens is
    one that does nothing.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BROWSER": "true"}
    run = [sys.executable, "-m", "flowturbo", *replaced(words, "--port", "0"), "--device", "cpu"]
    run += [] if "--port" in words else ["--port", "0"]
    with subprocess.Popen(
        run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            said = process.stdout.readline()  # type: ignore[union-attr]
        finally:
            process.send_signal(signal.SIGINT)
        left = process.communicate(timeout=60)
    assert "http://127.0.0.1:" in said, left
    assert process.returncode == 0, left


def run_example(block: Block, page: Path, names: dict[str, Any]) -> None:
    text = block.text
    for found, put in IN_PYTHON.items():
        text = text.replace(found, put)
    exec(compile("\n" * (block.line - 1) + text, page, "exec"), names)


@pytest.fixture
def folder(tmp_path, monkeypatch, pipeline_folders, one_thread) -> Path:
    """A folder with small files under published names, in which the test runs; Inception is a small
    random network.
    """
    import stand_ins  # needs diffusers

    stand_ins.write(tmp_path, pipeline_folders)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fidelity, "Inception", lambda weights, device: RandomNetwork())
    return tmp_path


RUNNABLE = [
    page
    for page in DOCUMENTS
    if any(block.language in ("bash", "python") for block in blocks(page.read_text()))
]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
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
    "command, made",
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
def test_commands_are_made_smaller_and_no_more(command, made):
    assert shlex.join(smaller(shlex.split(command))).startswith(made)


def test_every_command_can_be_read():
    """By the command line's own rules, as it stands there."""
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


def test_under_torchrun_the_documented_command_makes_the_whole_set(folder):
    """The others that start with torchrun are run as one process above."""
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # 6 images in files of 4, so that each process makes one.
    subprocess.run(
        [*launch, *words, "--shard-size", "4", "--batch-size", "4", "--device", "cpu"],
        check=True,
        env=environment,
        timeout=300,
    )
    assert main(["verify", "samples"]) == 0
    assert json.loads((folder / "samples" / "manifest.json").read_text())["shape"] == [6, 16, 16, 3]
