"""What holds for all tests: one thread, no deadlines, and Triton's interpreter without a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import fake_cuda
import pytest
import torch
from hypothesis import settings

# How long an example takes is the machine's affair: no test is about speed.
settings.register_profile("flowturbo", deadline=None)
settings.load_profile("flowturbo")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

# Here and in the processes that tests start. Products of tiny matrices gain nothing from threads,
# take ten times as long with them on a busy machine, and sum in another order.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_that_cuda_forbids() -> Iterator[None]:
    """On the stand-in for a CUDA device a test fails if it did what CUDA forbids, and took no note
    of it.
    """
    yield
    if fake_cuda.PRESENT and (done := fake_cuda.violations()):
        pytest.fail("what CUDA forbids was done:\n" + "\n".join(done))


@pytest.fixture(scope="session")
def pipeline_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small text-to-image pipeline of each kind, saved: 2rf, sd3 and flux."""
    complete = pytest.importorskip("complete", exc_type=ImportError)
    root = tmp_path_factory.mktemp("pipelines")
    for kind in ("2rf", "sd3", "flux"):
        getattr(complete, f"complete_{kind}")().save_pretrained(root / kind)
    return {kind: root / kind for kind in ("2rf", "sd3", "flux")}
