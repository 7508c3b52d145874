"""Decoding on the stand-in for a CUDA device: when cuDNN searches, and what a capture holds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fake_cuda

if not fake_cuda.PRESENT:
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from decoder import Autoencoder

from flowturbo.models.vae import DiffusersVAE
from flowturbo.models.vae_decoder import FusedDecoder
from flowturbo.models.vae_fusion import fuse
from flowturbo.runtime.cuda_graphs import Captures, Key
from flowturbo_kernels import _tune

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def own_choices(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))
    for known in ("_in_memory", "_on_disk"):
        monkeypatch.setattr(_tune, known, {})


def small(dtype: torch.dtype = torch.bfloat16) -> DiffusersVAE:
    network = Autoencoder((32, 64), layers=1).requires_grad_(False).eval().to(DEVICE, dtype)
    fuse(network)
    assert isinstance(network.decoder, FusedDecoder)
    return DiffusersVAE(network)


def latents(batch: int = 2) -> Tensor:
    return torch.zeros(batch, 4, 8, 8, device=DEVICE)


@pytest.fixture
def searches() -> Iterator[list[tuple[bool, bool]]]:
    """Of each convolution: whether cuDNN may search for it, and whether a capture runs."""
    seen: list[tuple[bool, bool]] = []
    original: Callable[..., Any] = nn.functional.conv2d

    def convolve(*args: Any, **options: Any) -> Tensor:
        state = torch.backends.cudnn.benchmark, torch.cuda.is_current_stream_capturing()
        seen.append(state)
        return original(*args, **options)

    with mock.patch.object(nn.functional, "conv2d", convolve):
        yield seen


def kinds(seen: list[tuple[bool, bool]]) -> set[tuple[bool, bool]]:
    found = set(seen)
    seen.clear()
    return found


def test_the_first_run_of_a_shape_searches_and_no_other(searches):
    vae = small()
    for batch in (2, 3):
        vae.decode(latents(batch))
        assert kinds(searches) == {(True, False)}
        assert not torch.backends.cudnn.benchmark
        vae.decode(latents(batch))
        assert kinds(searches) == {(False, False)}


def test_what_one_thread_found_another_does_not_know(searches):
    """torch keeps it for each thread."""
    vae = small()
    vae.decode(latents())
    kinds(searches)
    thread = threading.Thread(target=vae.decode, args=(latents(),))
    thread.start()
    thread.join()
    assert kinds(searches) == {(True, False)}


def test_a_capture_searches_nothing_and_runs_what_was_found(searches):
    vae, captures = small(), Captures()
    captures.precapture(Key("decoding", 2), vae.decode, {"latents": latents()}, [vae.network])
    assert kinds(searches) == {(True, False), (False, False), (False, True)}


@pytest.mark.parametrize("setting", ["deterministic", "benchmark"])
def test_the_users_settings_stay(setting, searches, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, setting, True)
    small().decode(latents())
    assert kinds(searches) == {(setting == "benchmark", False)}
    assert getattr(torch.backends.cudnn, setting)


def test_a_run_that_fails_leaves_the_setting_and_is_searched_for_again(searches):
    vae = small()
    with (
        mock.patch.object(FusedDecoder, "in_few_passes", side_effect=torch.OutOfMemoryError),
        pytest.raises(torch.OutOfMemoryError),
    ):
        vae.decode(latents(1))
    assert not torch.backends.cudnn.benchmark
    kinds(searches)
    vae.decode(latents(1))
    assert kinds(searches) == {(True, False)}


@pytest.mark.parametrize("way", ["one convolution", "four 2 x 2 convolutions"])
def test_either_way_of_a_doubling_is_captured(way, monkeypatch):
    """With its summed weights, whose address changes when they are made again."""
    asked: list[_tune.Candidates] = []

    def fastest(candidates: _tune.Candidates) -> str:
        asked.append(candidates)
        return way if way in candidates.functions else next(iter(candidates.functions))

    monkeypatch.setattr(_tune, "fastest", fastest)
    vae, captures = small(), Captures()
    captures.precapture(Key("decoding", 2), vae.decode, {"latents": latents()}, [vae.network])
    nodes = fake_cuda.captured()
    # Sums after conv_in, six residual blocks, the attention, the doubled convolution and conv_out;
    # convolutions of six blocks, a shortcut, the doubling, and three at the ends.
    assert sum("_add_kernel" in node for node in nodes) == 10
    assert sum("cudnn" in node for node in nodes) == 17
    assert any(way in candidates.functions for candidates in asked)
    [capture] = captures.report()
    assert capture.watched.fits([vae.network])
    with torch.no_grad():
        vae.network.decoder.up_blocks[0].upsamplers[0].conv.weight.mul_(2)
    vae.decode(latents())
    assert not capture.watched.fits([vae.network])


def test_a_doubling_is_measured_by_both_ways_outside_captures():
    vae = small()
    with mock.patch.object(_tune, "_measure", side_effect=_tune._measure) as measured:
        vae.decode(latents())
        asked = [call.args[0].question[0] for call in measured.call_args_list]
        assert asked == ["doubled_convolution"]
        vae.decode(latents())
        assert measured.call_count == 1
