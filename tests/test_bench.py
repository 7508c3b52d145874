"""The benchmarks run, on whatever is here, and their table reads their report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernel_benchmarks_run_and_are_tabled(tmp_path):
    report = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "pytest", "-q", "bench/test_kernels.py", f"--benchmark-json={report}"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    measured = {b["extra_info"]["op"] for b in json.loads(report.read_text())["benchmarks"]}
    assert {"attention", "linear", "final_update"} <= measured
    page = tmp_path / "RESULTS.md"
    subprocess.run([sys.executable, "bench/table.py", str(report), str(page)], cwd=ROOT, check=True, capture_output=True)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len({b["group"] for b in json.loads(report.read_text())["benchmarks"]})
    assert all(row.count("|") == rows[0].count("|") for row in rows)
