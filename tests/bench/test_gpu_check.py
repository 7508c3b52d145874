"""bench/gpu_check.sh without a GPU: its stages and files are real, what it measures is replaced by
benchmarks that take no time.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import report
import table

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"

CHECKOUT = {
    # What stands in for the checkout's own: the benchmarks, the library as far as the script calls
    # it, the tests that need a GPU.
    "torch/__init__.py": "class cuda:\n    is_available = staticmethod(lambda: True)\n",
    "bench/machine.py": """
import json, os
name = os.environ["DEVICE"]
facts = {"device": name, "code": "commit 1234", "torch": "2.11"}
print(name, name.lower().replace(" ", "-"), "90a", json.dumps(facts), sep="\\n")
""",
    "bench/test_plans.py": """
import os, signal, time, pytest
RIVALS = "ours ours-fp8 ours-eager eager autocast compile max-autotune plan-graph".split()
RIVALS += "plan-graph-hoisted max-autotune-fp8 plan-graph-fp8".split()
ROUNDS = 3

def about(rival, size, batch, decode, plan):
    return {"group": f"{plan} {size}x{size} batch {batch}", "who": rival}

def test_plan(benchmark, rounds, rival, size, batch, decode, plan):
    if rival == "ours-fp8":
        pytest.skip("fp8 is not here")
    if rival == "autocast":
        raise RuntimeError("out of memory\\nof 80 GB")
    if rival == os.environ.get("DEAF"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    benchmark.group = about(rival, size, batch, decode, plan)["group"]
    benchmark.extra_info |= dict(
        rival=rival, plan=plan, size=size, batch=batch, decode=False, first_seconds=1.0,
        peak_bytes=1 << 30, decode_seconds=0.0,
        floor=1e-9, ceilings={"copy": 3e12}, device=os.environ["DEVICE"], dtype="bfloat16",
        torch="2.11",
    )
    def run():
        if rival == os.environ.get("SLOW"):
            open(os.environ["REACHED"], "w").close()
            time.sleep(600)

    benchmark.pedantic(run, rounds=rounds, iterations=1)
""",
    "bench/test_kernels.py": """
import os, time
PROVIDERS = ("eager", "compiled", "triton", "cuda", "auto")
ROUNDS = 3

def about(batch, who):
    return {"group": f"attention batch {batch}", "who": who}

def test_kernel(benchmark, rounds, batch, who):
    benchmark.group = about(batch, who)["group"]
    benchmark.extra_info |= dict(
        op="attention", batch=batch, provider=who, backend="torch", calls=8, floor=1e-9,
        ceilings={"copy": 3.1e12},
        device=os.environ["DEVICE"], dtype="torch.bfloat16", torch="2.11",
    )
    benchmark.pedantic(time.sleep, args=(0.001,), rounds=rounds, iterations=1)
""",
    "bench/growth.py": """
import os, sys
from lines import append
for at in (1, 8):
    point = {"at": at, "plan": "H1", "batch": at, "tokens": 256, "ms_an_image": 5 / at,
    "limit_ms_an_image": 1.0}
    append("growth", curve="batch", device=os.environ["DEVICE"], point=point)
open(sys.argv[1] + "/growth.png", "wb").close()
""",
    "flowturbo/cli/info.py": "def report():\n    return 'what it runs on'\n",
    "flowturbo/evaluation/latency.py": """
from dataclasses import dataclass
@dataclass
class Bench:
    model: str
    plans: tuple
    batch_sizes: tuple
    repeats: int
    profile: object

def bench(settings):
    settings.profile.mkdir(parents=True)
    for name in ("trace.json", "md"):
        (settings.profile / f"{settings.plans[0]}-batch8.{name}").write_text("a trace")
""",
    "setup.py": "raise SystemExit('there is no nvcc')",
    "tests/kernels/test_gpu.py": """
import pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_wrong(): assert 1 == 2
def test_cuda_backend_float32(): pytest.skip("no CuPy")
""",
    "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["gpu: needs a CUDA device"]\n',
}


TOOLS = {
    # In front of the machine's own.
    "compute-sanitizer": 'until [[ $1 == *python* ]]; do shift; done\nexec "$@"\n',
    # The time is up once the slow benchmark is reached, however long that takes; an alarm is how
    # timeout itself learns of it.
    "timeout": f"""
set -m
{shutil.which("timeout")} "${{@:1:4}}" 3000 "${{@:6}}" &
until [ -e "$REACHED" ]; do kill -0 $! 2>/dev/null || break; sleep 0.1; done
[ ! -e "$REACHED" ] || {{ rm "$REACHED"; kill -ALRM $!; }}
wait $!
""",
}


@pytest.fixture
def checkout(tmp_path):
    """A copy of the script and what reads and writes its reports, in a checkout that has nothing
    else of the real one.
    """
    root = tmp_path / "checkout"
    for name, text in CHECKOUT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in ("gpu_check.sh", "conftest.py", "lines.py", "report.py", "summary.py", "table.py"):
        shutil.copy(ROOT / "bench" / name, root / "bench" / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}")
        (tools / name).chmod(0o755)
    return root


def check(checkout: Path, folder: Path, part: str, **variables: str) -> tuple[int, list[str]]:
    """The script's exit status and the lines that it printed."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FLOWTURBO", "FAKE", "PYTEST"))
    }
    environment |= {
        "PYTHON": sys.executable,
        "DEVICE": H100,
        "FLOWTURBO_BENCH_PLANS": "H1P5R3 H8",
        **variables,
    }
    environment["REACHED"] = str(checkout.parent / "reached")
    environment["PATH"] = f"{checkout.parent / 'tools'}:{environment['PATH']}"
    command = ["bash", str(checkout / "bench/gpu_check.sh"), part, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=checkout.parent
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def listed() -> dict[str, dict[str, int]]:
    """The limits of the real script: part -> stage -> seconds."""
    text = subprocess.run(
        ["bash", str(ROOT / "bench/gpu_check.sh"), "list"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for part, stage, seconds in map(str.split, text.splitlines()):
        found[part][stage] = int(seconds)
    return found


def test_every_part_ends_within_nine_minutes():
    limits = listed()
    assert list(limits) == [
        "correct",
        "kernels",
        "plans",
        "rivals-8",
        "best-8",
        "rivals-1",
        "best-1",
        "growth",
    ]
    for part, stages in limits.items():
        assert sum(stages.values()) < 540, part


def test_what_is_no_part_is_refused():
    command = ["bash", str(ROOT / "bench/gpu_check.sh"), "kernel"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "PART must be one of correct kernels plans" in done.stderr
    assert "got 'kernel'" in done.stderr


def conftest_options() -> dict[str, tuple[str, str, str]]:
    """Of bench/conftest.py, whose name is also another's."""
    spec = importlib.util.spec_from_file_location("bench_conftest", ROOT / "bench/conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OPTIONS


def test_every_rival_is_measured_by_some_part():
    import rivals

    script = (ROOT / "bench/gpu_check.sh").read_text()
    named = {
        word for line in re.findall(r"plan_stage \S+ \d+ \S+ (.+)", script) for word in line.split()
    }
    assert named == set(rivals.RIVALS) - {
        "diffusers"
    }  # whose weights are its own, and which is seldom there
    assert set(conftest_options()["rivals"][0].split()) == set(rivals.RIVALS) == set(table.RIVALS)


def test_all_parts_leave_few_files_and_a_summary_each(checkout, tmp_path):
    folder = tmp_path / "results"
    status, printed = check(checkout, folder, "all")
    assert status == 1
    for device in (H200,):  # another device's results, beside
        assert check(checkout, folder, "rivals-8", DEVICE=device)[0] == 0

    files = sorted(folder.rglob("*"))
    names = [path.name for path in files]
    ends = [
        f"{device}.{end}"
        for device in ("nvidia-h100-80gb-hbm3", "nvidia-h200")
        for end in ("jsonl", "tar.gz", "txt")
    ]
    assert names == sorted(["RESULTS.md", *ends])
    assert len(files) <= 8
    assert all(path.is_file() and re.fullmatch(r"[A-Za-z0-9._-]+", path.name) for path in files)

    summaries = (folder / "nvidia-h100-80gb-hbm3.txt").read_text().splitlines()
    assert printed[0] == summaries[0]
    assert printed[-len(summaries) :] == summaries
    assert all(
        printed.count(line) == 3 for line in summaries
    )  # first and last of its part, and at the end
    correct, kernels, plans, rivals8, best8, rivals1, _, growth = summaries
    assert correct.startswith(
        f"correct: 1 passed, 1 failed, 1 skipped, nothing found by compute-sanitizer on {H100}; "
        "NOT PASSED: build"
    )
    assert re.match(
        rf"kernels: 2 operations measured, .*x eager .*x compiled .* on {H100}; NOT PASSED: build "
        r"failed",
        kernels,
    )
    assert re.match(
        r"plans: H1P5R3 256x256 batch 8 ours \d.*; H1P5R3 256x256 batch 1 ours .*x eager.*; NOT "
        r"PASSED: batch-8",
        plans,
    )
    assert re.match(
        rf"rivals-8: H1P5R3 256x256 batch 8 ours .*x max-autotune, .*x plan-graph on {H100}$",
        rivals8,
    )
    assert re.match(r"best-8: H1P5R3 256x256 batch 8 ours .*x plan-graph-hoisted, ", best8)
    assert "batch 1" in rivals1
    assert growth == (
        f"growth: 2 points measured, batch 1 5.00 ms an image, batch 8 0.62 ms an image on {H100}"
    )

    page = (folder / "RESULTS.md").read_text()
    assert page.count(f"## {H100}") == page.count(f"## {H200}") == 1
    assert (
        "- autocast, failed: RuntimeError: out of memory: H1P5R3 256x256 batch 8; H8 256x256 "
        "batch 8"
    ) in page
    assert "- ours-fp8, fp8 is not here: H1P5R3" in page
    assert "- the stage build of correct failed (exit status 1)" in page
    assert "- `tests/kernels/test_gpu.py::test_wrong`: assert 1 == 2" in page

    with tarfile.open(folder / "nvidia-h100-80gb-hbm3.tar.gz") as archive:
        inside = {Path(name).name for name in archive.getnames()}
    assert {
        "correct-build.log",
        "correct-tests.log",
        "plans-batch-8.log",
        "rivals-1-compile.log",
        "growth.png",
    } <= inside
    assert "H1P5R3-batch8.trace.json" in inside


@pytest.mark.parametrize("deaf", ["", "eager"], ids=["interrupted", "killed"])
def test_a_stage_that_passes_its_limit_keeps_what_it_measured(checkout, tmp_path, deaf):
    """It ends in the middle of a benchmark, and what comes after it in the part is measured all the
    same.
    """
    variables = {
        "SLOW": "eager",
        "DEAF": deaf,
        "FLOWTURBO_BENCH_LIMITS": "8",
        "FLOWTURBO_BENCH_PLANS": "H1",
    }
    status, printed = check(checkout, tmp_path, "plans", FLOWTURBO_BENCH_BATCHES="8", **variables)
    assert status == 1
    assert printed[0] == printed[-1]
    assert re.match(
        rf"plans: H1 256x256 batch 8 ours \d.* on {H100}; NOT PASSED: batch-8 was stopped at its "
        r"limit$",
        printed[0],
    )
    [device] = report.read([tmp_path]).values()
    assert {who for _, who in device.entries} == {"ours", "ours-eager"}
    assert (
        device.missing["H1 256x256 batch 8", "eager"]
        == "not reached: batch-8 was stopped at its limit"
    )
    assert (
        device.missing["H1 256x256 batch 8", "autocast"]
        == "not reached: batch-8 was stopped at its limit"
    )
    assert [stage.ended for stage in device.stages[device.last_run("plans")].values()][1:] == [
        "passed",
        "passed",
    ]
    assert (
        "- eager, not reached: batch-8 was stopped at its limit: H1 256x256 batch 8"
        in (tmp_path / "RESULTS.md").read_text()
    )


def test_what_is_measured_again_is_replaced_and_the_rest_is_kept(checkout, tmp_path):
    variables = {"FLOWTURBO_BENCH_PLANS": "H1", "FLOWTURBO_BENCH_BATCHES": "1"}
    check(checkout, tmp_path, "rivals-1", **variables)
    check(checkout, tmp_path, "rivals-1", FLOWTURBO_BENCH_RIVALS="ours", **variables)
    [device] = report.read([tmp_path]).values()
    first, second = device.runs
    assert device.entries["H1 256x256 batch 1", "ours"].run == second
    compiled = device.entries["H1 256x256 batch 1", "compile"]
    assert compiled.run == first
    assert compiled.beside["ours"].run == first
    with tarfile.open(tmp_path / "nvidia-h100-80gb-hbm3.tar.gz") as archive:
        assert any(name.endswith("rivals-1-ours.log") for name in archive.getnames())


def test_the_extension_is_built_where_no_pyproject_is_read(checkout, tmp_path):
    """setuptools before 77 can't read ours."""
    (checkout / "setup.py").write_text("""
import sys
from pathlib import Path
assert not Path("pyproject.toml").exists()
lib = Path(sys.argv[sys.argv.index("--build-lib") + 1])
(lib / "built").write_text(" ".join(sys.argv))
""")
    status, printed = check(checkout, tmp_path, "kernels", FLOWTURBO_BENCH_BATCHES="8")
    assert status == 0
    assert "NOT PASSED" not in printed[0]
    assert "build_ext" in (checkout / "built").read_text()


def test_python_may_be_python3_only(checkout, tmp_path):
    for name, text in (("python", "exit 127"), ("python3", f'exec {sys.executable} "$@"')):
        (tmp_path / "tools" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "tools" / name).chmod(0o755)
    assert check(checkout, tmp_path / "results", "growth", PYTHON="")[0] == 0


def test_without_torch_or_a_device_it_says_so(checkout, tmp_path):
    (checkout / "bench/machine.py").write_text("import sys; sys.exit('torch finds no CUDA device')")
    for variables, message in (
        ({}, "torch finds no CUDA device"),
        ({"PYTHON": "no-python"}, "none of no-python has torch: set PYTHON"),
    ):
        with pytest.raises(AssertionError, match=message):
            check(checkout, tmp_path, "correct", **variables)
    assert not list(tmp_path.glob("*.*"))
