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
from bench_checkout import CHECKOUT
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import plan_tables
import report

TUNED = [
    "max-autotune",
    "plan-graph",
    "plan-graph-hoisted",
    "max-autotune-fp8",
    "plan-graph-fp8",
]
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"

SCRIPTS = "gpu_check.sh conftest.py lines.py report.py cells.py plan_tables.py summary.py table.py"
SCRIPTS = SCRIPTS.split()

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
    for name in SCRIPTS:
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
    tuned = [f"{rival}-{batch}" for batch in (8, 1) for rival in TUNED]
    assert list(limits) == ["correct", "kernels", "plans-8", "plans-1", *tuned, "growth"]
    for part, stages in limits.items():
        assert sum(stages.values()) < 540, part


def test_a_rival_that_is_tuned_has_most_of_a_part_and_ours_beside_it():
    """Its products are timed tile by tile, for minutes; and a ratio is of one run."""
    limits = listed()
    for rival in TUNED:
        ours = "ours-fp8" if rival.endswith("fp8") else "ours"
        for batch in (8, 1):
            stages = limits[f"{rival}-{batch}"]
            assert list(stages) == [ours, rival, "table"]
            assert stages[rival] >= 350
            assert stages[ours] >= 160  # it compiles 73 kernels


def test_the_sanitizer_sees_every_allocation():
    """Within torch's pieces of 2 MiB nothing is out of bounds."""
    script = (ROOT / "bench/gpu_check.sh").read_text()
    [command] = re.findall(r"stage sanitizer (?:.*\\\n)*.*", script)
    assert " PYTORCH_NO_CUDA_MEMORY_CACHING=1 " in command
    assert listed()["correct"]["sanitizer"] >= 200


def test_what_is_no_part_is_refused():
    command = ["bash", str(ROOT / "bench/gpu_check.sh"), "kernel"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "PART must be one of correct kernels plans-8" in done.stderr
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
        w for line in re.findall(r"plan_stage \w\S* \d+ \S+ (.+)", script) for w in line.split()
    }
    assert named - {";;"} | set(TUNED) == set(rivals.RIVALS) - set(rivals.OWN_WEIGHTS)
    assert (
        set(conftest_options()["rivals"][0].split())
        == set(rivals.RIVALS)
        == set(plan_tables.RIVALS)
    )


@pytest.mark.slow
def test_all_parts_leave_few_files_and_a_summary_each(checkout, tmp_path):
    folder = tmp_path / "results"
    rivals = "ours ours-fp8 ours-eager eager autocast compile max-autotune plan-graph-fp8"
    status, printed = check(checkout, folder, "all", FLOWTURBO_BENCH_RIVALS=rivals)
    assert status == 1
    for device in (H200,):  # another device's results, beside
        assert check(checkout, folder, "max-autotune-8", DEVICE=device)[0] == 0

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
    check_summaries(summaries)
    check_page((folder / "RESULTS.md").read_text())
    with tarfile.open(folder / "nvidia-h100-80gb-hbm3.tar.gz") as archive:
        inside = {Path(name).name for name in archive.getnames()}
    assert {
        "correct-build.log",
        "correct-tests.log",
        "plans-8-ours.log",
        "max-autotune-1-max-autotune.log",
        "growth.png",
    } <= inside
    assert {"H1P5R3-batch8.trace.json", "H1P5R3-batch1.trace.json"} <= inside


def check_summaries(summaries: list[str]) -> None:
    by_part = {line.split(":")[0]: line for line in summaries}
    assert list(by_part) == list(listed())
    correct, kernels, growth = (by_part[part] for part in ("correct", "kernels", "growth"))
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
        r"plans-8: H1P5R3 256x256 batch 8 ours \d.*x eager, .*x compile on .*; NOT PASSED: ours",
        by_part["plans-8"],
    )
    assert re.match(
        rf"max-autotune-8: H1P5R3 256x256 batch 8 ours .*x max-autotune on {H100}$",
        by_part["max-autotune-8"],
    )
    assert re.match(
        r"plan-graph-fp8-8: H1P5R3 256x256 batch 8 plan-gr", by_part["plan-graph-fp8-8"]
    )
    assert " batch 1 " in by_part["max-autotune-1"]
    assert by_part["plan-graph-1"] == f"plan-graph-1: nothing measured on {H100}"
    assert growth == (
        f"growth: 2 points measured, batch 1 5.00 ms an image, batch 8 0.62 ms an image on {H100}"
    )


def check_page(page: str) -> None:
    assert page.count(f"## {H100}") == page.count(f"## {H200}") == 1
    assert (
        "- autocast, failed: RuntimeError: out of memory: H1P5R3 256x256 batch 8; H8 256x256 "
        "batch 8"
    ) in page
    assert "- ours-fp8, fp8 is not here: H1P5R3" in page
    assert "- the stage build of correct failed (exit status 1)" in page
    assert "- `tests/kernels/test_gpu.py::test_wrong`: assert 1 == 2" in page


@pytest.mark.slow
@pytest.mark.parametrize("deaf", ["", "eager"], ids=["interrupted", "killed"])
def test_a_stage_that_passes_its_limit_keeps_what_it_measured(checkout, tmp_path, deaf):
    """It ends in the middle of a benchmark, and what comes after it in the part is measured all the
    same.
    """
    variables = {
        "SLOW": "eager",
        "DEAF": deaf,
        "FLOWTURBO_BENCH_LIMITS": "5",
        "FLOWTURBO_BENCH_PLANS": "H1",
    }
    status, printed = check(checkout, tmp_path, "plans-8", **variables)
    assert status == 1
    assert printed[0] == printed[-1]
    assert re.match(
        rf"plans-8: H1 256x256 batch 8 ours \d.* on {H100}; NOT PASSED: ours was stopped at its "
        r"limit$",
        printed[0],
    )
    [device] = report.read([tmp_path]).values()
    assert {who for _, who in device.entries} == {"ours", "ours-eager", "compile"}
    assert (
        device.missing["H1 256x256 batch 8", "eager"]
        == "not reached: ours was stopped at its limit"
    )
    assert (
        device.missing["H1 256x256 batch 8", "autocast"]
        == "not reached: ours was stopped at its limit"
    )
    assert [stage.ended for stage in device.stages[device.last_run("plans-8")].values()][1:] == [
        "passed",
        "passed",
        "passed",
    ]
    assert (
        "- eager, not reached: ours was stopped at its limit: H1 256x256 batch 8"
        in (tmp_path / "RESULTS.md").read_text()
    )


@pytest.mark.slow
def test_what_is_measured_again_is_replaced_and_the_rest_is_kept(checkout, tmp_path):
    check(checkout, tmp_path, "max-autotune-1", FLOWTURBO_BENCH_PLANS="H1")
    check(checkout, tmp_path, "plan-graph-1", FLOWTURBO_BENCH_PLANS="H1")
    [device] = report.read([tmp_path]).values()
    first, second = device.runs
    assert device.entries["H1 256x256 batch 1", "ours"].run == second
    tuned = device.entries["H1 256x256 batch 1", "max-autotune"]
    assert tuned.run == first
    assert tuned.beside["ours"].run == first
    with tarfile.open(tmp_path / "nvidia-h100-80gb-hbm3.tar.gz") as archive:
        assert any(name.endswith("max-autotune-1-ours.log") for name in archive.getnames())


@pytest.mark.slow
def test_a_part_resumes_from_its_own_caches_and_says_that_they_are_warm(checkout, tmp_path):
    """What another part has compiled is in none of its first images."""
    seen = []
    for part in ("max-autotune-1", "plan-graph-1", "max-autotune-1"):
        check(checkout, tmp_path, part, FLOWTURBO_BENCH_PLANS="H1")
        [device] = report.read([tmp_path]).values()
        rival = part.removesuffix("-1")
        caches = [
            device.entries["H1 256x256 batch 1", who].info["caches"] for who in ("ours", rival)
        ]
        seen.append([tuple(cache[name] for name in sorted(cache)) for cache in caches])
    first, other, again = seen
    folders = {place for stage in (*first, *other) for place in stage[1:]}
    assert len(folders) == 8  # two caches of two stages of two parts
    assert [stage[0] for stage in (*first, *other, *again)] == ["cold"] * 4 + ["warm"] * 2
    assert [stage[1:] for stage in again] == [stage[1:] for stage in first]
    assert all(Path(folder).is_relative_to(checkout / "build") for folder in folders)


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
