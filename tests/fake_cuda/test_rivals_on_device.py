"""Every rival is set up and called on the stand-in for a CUDA device, as on a GPU but for depth and
the search for fast kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fake_cuda

if not fake_cuda.PRESENT:
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import inductor
import rivals
import subjects
from rival_dtypes import check_dtypes
from torch._inductor import config

import flowturbo as ft
from flowturbo.evaluation.latency import fresh_peak, measure
from flowturbo.models.vae import DiffusersVAE

EAGER = ["ours", "ours-eager", "ours-fp8", "eager", "autocast"]
COMPILED = [
    "compile",
    "max-autotune",
    "plan-graph",
    "max-autotune-fp8",
    "plan-graph-hoisted",
    "plan-graph-fp8",
]
WHOLE = ["ours", "ours-fp8", "plan-graph", "plan-graph-hoisted", "plan-graph-fp8"]
"""Those whose plans are one graph."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One block, a small decoder and no search: what is compiled here takes minutes otherwise."""
    monkeypatch.setenv(subjects.DEPTH, "1")
    monkeypatch.setenv(subjects.DECODER, "small")
    monkeypatch.setattr(
        inductor, "OPTIONS", inductor.OPTIONS | {"coordinate_descent_tuning": False}
    )
    monkeypatch.setitem(
        sys.modules, "torchao", None
    )  # weights quantised by it do not tell their dtype
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention is not in the stand-in
    fewer = {
        "max_autotune_gemm_backends": "ATEN",
        "max_autotune_conv_backends": "ATEN",
        # it loads modules from files, which the stand-in does not
        "use_static_cuda_launcher": False,
    }
    with config.patch({name: value for name, value in fewer.items() if hasattr(config, name)}):
        yield
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch._dynamo.reset()


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of each decoding that is not replayed: whether convolutions are tuned, and whether it is
    captured.
    """
    seen = []
    decode = DiffusersVAE._images

    def watched(self: DiffusersVAE, z: torch.Tensor) -> torch.Tensor:
        seen.append((torch.backends.cudnn.benchmark, torch.cuda.is_current_stream_capturing()))
        return decode(self, z)

    monkeypatch.setattr(DiffusersVAE, "_images", watched)
    return seen


@pytest.mark.parametrize("rival", [*EAGER, *COMPILED])
def test_a_rival_is_set_up_and_samples(rival: str, images: list[tuple[bool, bool]]) -> None:
    # Of those that compile, two with the decoder: the others' is the same.
    decode = rival not in COMPILED or rival in ("max-autotune", "plan-graph")
    s = subjects.subject(64, 2, decode)
    assert s.about == {"depth": 1, "decoder": "small"}
    assert s.noise.is_cuda
    assert s.labels.is_cuda
    sampler = rivals.RIVALS[rival](s)
    check_dtypes(rival, sampler.model)
    for _ in range(2):
        result = sampler("H1R1")
    if decode:
        assert (result.shape, result.dtype) == ((2, 64, 64, 3), torch.uint8)
    else:
        assert (result.shape, result.dtype) == ((2, 4, 8, 8), torch.float32)
    check_dtypes(rival, sampler.model)
    assert not torch.backends.cudnn.benchmark
    assert all(tuned for tuned, _ in images)
    # A convolution that nobody met before would be timed, which a capture forbids: runs as they are
    # come first.
    assert not images or not images[0][1]
    fake_cuda.launches()
    sampler("H1R1")
    launched = fake_cuda.launches()
    if rival in WHOLE:
        assert len(launched) < 5, launched  # the graph, and copies
        assert len(sampler.model.captures.report()) == 1
    else:
        assert len(launched) > 10
    if rival.startswith("max-autotune"):
        assert any("graph" in name.lower() for name in launched), launched


@pytest.mark.parametrize("rival", ["eager", "plan-graph-fp8"])
def test_a_rival_below_sm_89_has_no_fp8(rival: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    s = subjects.subject(64, 1, False)
    if rival == "eager":
        rivals.eager(s)
    else:
        with pytest.raises(rivals.Unavailable, match="this one is sm_80"):
            rivals.RIVALS[rival](s)


def test_the_published_decoder_is_the_one_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(subjects.DECODER)
    s = subjects.subject(64, 1, True)
    assert s.decoder == "full"
    assert sum(p.numel() for p in s.vae.parameters()) > 49e6


# Memory


def test_freed_memory_and_old_workspaces_are_in_no_later_peak() -> None:
    device = torch.device("cuda")
    torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    fresh_peak(device)
    clean = torch.cuda.max_memory_reserved()
    rubbish = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    for _ in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            a = torch.ones(64, 64, device=device)
            a @ a  # leaves a workspace for the stream
    del rubbish, a
    assert torch.cuda.memory_reserved() > clean + (1 << 28)
    fresh_peak(device)
    assert torch.cuda.max_memory_reserved() <= clean


def test_a_plan_takes_as_much_memory_whatever_was_measured_before() -> None:
    s = subjects.subject(64, 2, False)
    model = ft.load(s.predictor, s.refiner, device="cuda", dtype=torch.bfloat16)
    peaks = [
        measure(model, plan, 2, 1.5, "latents", repeats=1).peak_bytes
        for plan in ("H1R1", "E3", "H1R1", "E3", "H1R1")
    ]
    assert peaks[2] == peaks[4]
    assert abs(peaks[2] - peaks[0]) <= 4 << 20  # the first also loads what all need
