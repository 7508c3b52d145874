"""The CUDA extension is built wherever nvcc is, and says what it holds."""

from __future__ import annotations

import importlib
import os
import shutil

import pytest


@pytest.mark.skipif(
    shutil.which("nvcc") is None or os.environ.get("FLOWTURBO_BUILD_CUDA") == "0",
    reason="no nvcc here",
)
def test_the_extension_was_built_and_imports_without_a_gpu():
    built = importlib.import_module("flowturbo_kernels._C").build_info()
    assert built.cuda_version >= 11000
    archs = built.architectures.split()
    assert archs
    assert all(arch.rstrip("a").isdigit() for arch in archs)
    assert built.devices > 0 or built.problem
