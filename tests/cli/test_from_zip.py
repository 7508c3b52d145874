"""The packages run from a zip, as tools that bundle applications make one."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flowturbo
import flowturbo_kernels


@pytest.mark.slow
def test_the_bundled_model_samples_from_a_zip(tmp_path):
    archive = tmp_path / "app.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for package in (flowturbo, flowturbo_kernels):
            folder = Path(package.__file__).parent
            for path in folder.rglob("*"):
                if path.is_file() and path.suffix in (".py", ".safetensors"):
                    file.write(path, path.relative_to(folder.parent))
    done = subprocess.run(
        [sys.executable, "-m", "flowturbo", "sample", "--labels", "3", "--out", "a.png"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(archive)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").stat().st_size > 0
