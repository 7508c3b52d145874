"""Rivals are set up as well as their users would, on the same inputs, and each is held against the
limit that is its own.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from close import assert_close
from fake_recorder import Fake
from paths import ROOT
from rival_dtypes import check_dtypes
from tiny import CONFIG, random_sit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flowturbo as ft
from flowturbo.models.flow_model import AdaptiveNetwork
from flowturbo.models.vae import DiffusersVAE
from flowturbo.sampling.run import Job

sys.path.insert(0, str(ROOT / "bench"))

import rivals
import sampling
import subjects
from decoder import Autoencoder, Whole
from plain_sit import FusedMLP, HoistedSiT, PlainSiT

HERE = ["ours", "ours-eager", "ours-fp8", "eager", "autocast"]
"""Those that run on the CPU without compiling."""


# The same work


@pytest.mark.parametrize("rival", HERE)
def test_everyone_samples_the_same_noise_and_labels_of_the_device(rival, monkeypatch):
    """The tensors themselves: none is made, copied from the host or chosen from others in a
    call.
    """
    s = subjects.subject(64, 3, False)
    sampler = rivals.RIVALS[rival](s)
    seen = []
    run = Job.run

    def watched(self, model, inputs, guidance, monitor):
        seen.append((str(self.plan), inputs, guidance))
        return run(self, model, inputs, guidance, monitor)

    monkeypatch.setattr(Job, "run", watched)
    assert sampler("H1R1").shape == s.noise.shape
    [(plan, inputs, guidance)] = seen
    assert (plan, guidance) == ("H1R1", subjects.GUIDANCE)
    assert inputs["noise"] is s.noise
    assert inputs["labels"] is s.labels


@pytest.mark.parametrize("rival", HERE)
def test_a_call_copies_nothing_from_the_host_and_reads_nothing_from_the_device(rival):
    """On a GPU both would wait for it: noise made on the CPU, rows chosen by the CPU, a number
    looked at.
    """
    sampler = rivals.RIVALS[rival](subjects.subject(64, 2, False))
    sampler("H1R1")

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            asked.add(function._schema.name)
            return function(*args, **(kwargs or {}))

    asked: set[str] = set()
    with Asked():
        sampler("H1R1")
    assert not asked & {
        "aten::_local_scalar_dense",
        "aten::randn",
        "aten::normal_",
        "aten::index",
        "aten::nonzero",
    }


def test_the_noise_is_that_of_the_first_seed():
    s = subjects.subject(64, 2, False)
    model = ft.load(s.predictor, s.refiner, device="cpu", dtype=torch.float32)
    assert s.noise.shape == (2, 4, 8, 8)
    expected = ft.sample(model, "E1", [0, 1], guidance=subjects.GUIDANCE, seed=0)
    assert rivals.eager(s)("E1").sub(expected).abs().max() < 1e-5


def recorded(s: subjects.Subject, hoisted: bool) -> tuple[sampling.Sampler, Fake]:
    """plan-graph as it is but for what compiles and captures."""
    wrap = HoistedSiT if hoisted else rivals._as_it_is
    model, _ = rivals._plain(s, wrap, rivals._decoder_of(s))
    model.captures.recorder = recorder = Fake()
    return sampling.captured(s, model, kind=sampling.AnyJob), recorder


@pytest.mark.parametrize("hoisted", [False, True], ids=["plan-graph", "plan-graph-hoisted"])
@pytest.mark.parametrize("decode", [False, True], ids=["latents", "images"])
def test_whole_plans_of_plain_networks_are_captured_once_and_replayed(hoisted, decode):
    s = subjects.subject(64, 2, decode)
    sampler, recorder = recorded(s, hoisted)
    images = [sampler("H1P1R1") for _ in range(3)]
    assert (recorder.recorded, sampler.model.captures.report()[0].hits) == (1, 3)
    expected = rivals.eager(s)("H1P1R1")
    for image in images:
        if decode:
            assert (image.int() - expected.int()).abs().max() <= 1  # rounded to whole numbers
        else:
            assert_close(image, expected, 1e-5)


def test_one_plan_is_captured_at_a_time():
    """Or the memory of those before would be counted as the next one's."""
    sampler, recorder = recorded(subjects.subject(64, 1, False), hoisted=False)
    for plan in ("E1", "E2", "E1"):
        sampler(plan)
        assert [str(c.key.what.plan) for c in sampler.model.captures.report()] == [plan]
    assert recorder.recorded == 3


# Convolutions


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("rival", [*HERE, "plan-graph"])
def test_convolutions_are_tuned_for_everyone_and_what_was_set_is_put_back(
    rival, before, monkeypatch
):
    """In a capture as in the runs before it: the choice that those have left is there, and nothing
    has to be timed.
    """
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    s = subjects.subject(64, 2, True)
    seen = []
    decode = DiffusersVAE._images

    def watched(self: DiffusersVAE, z: torch.Tensor) -> torch.Tensor:
        seen.append((torch.backends.cudnn.benchmark, z.shape, z.stride(), z.dtype))
        return decode(self, z)

    monkeypatch.setattr(DiffusersVAE, "_images", watched)
    sampler = recorded(s, False)[0] if rival == "plan-graph" else rivals.RIVALS[rival](s)
    sampler("E1")
    sampler("E1")
    assert len(seen) >= 2
    assert all(tuned for tuned, *_ in seen)
    assert len(set(seen)) == 1  # so that whatever was chosen in the first run serves the capture
    assert torch.backends.cudnn.benchmark is before
    with pytest.raises(ValueError, match="plan"):
        sampler("nonsense")
    assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize("faster", ["NCHW", "NHWC"])
@pytest.mark.parametrize("rival", ["eager", "autocast"])
def test_eager_torch_decodes_in_the_faster_layout(rival, faster, monkeypatch):
    times = iter([1.0] * 3 + [2.0] * 3 if faster == "NCHW" else [2.0] * 3 + [1.0] * 3)
    monkeypatch.setattr(rivals, "seconds", lambda run, device: next(times))
    s = subjects.subject(64, 2, True)
    sampler = rivals.RIVALS[rival](s)
    assert sampler.settings.startswith(f"decoder in {faster} (ms a batch: NCHW ")
    layout = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}[faster]
    convolutions = [
        m
        for m in sampler.model.vae.network.modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    seen = []
    for convolution in convolutions:
        assert convolution.weight.is_contiguous(memory_format=layout)
        convolution.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    sampler("E1")
    assert len(seen) >= len(convolutions)
    assert all(
        t.is_contiguous(memory_format=layout) for pair in seen for t in pair if t.shape[1] > 1
    )


def test_a_wrapped_decoder_decodes_the_same():
    vae = Autoencoder((8, 16), 1, 4).double().requires_grad_(False)
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        wrapped = Whole.of(vae, layout, lambda network: network)
        assert (wrapped.device, wrapped.dtype) == (vae.device, torch.float64)
        assert_close(wrapped.decode(z).sample, vae.decode(z).sample, 1e-12)


# Autocast


class Casts(TorchDispatchMode):
    """Counts casts of a network's weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.weights = {p.data_ptr() for p in network.parameters()}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.weights:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_second_call_under_autocast_casts_no_weight():
    """Autocast keeps casts of weights that require gradients only: without that every call of
    SiT-XL/2 would cast 2.7 GB.
    """
    network = rivals.autocast(subjects.subject(64, 2, False)).model.predictor
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    counts = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            with Casts(network) as casts:
                network(x, t, y)
            counts.append(casts.count)
    assert counts[0] > 4 * 2 * network.config.depth  # weights and biases of the products
    assert counts[1] == 0


def test_autocast_casts_a_weight_once_a_batch():
    """One context holds all calls of a batch, and none keeps a graph of gradients."""
    sampler = rivals.autocast(subjects.subject(64, 2, False))
    counts = []
    for plan in ("E1", "E3"):
        with Casts(sampler.model.predictor) as casts:
            assert not sampler(plan).requires_grad
        counts.append(casts.count)
    assert counts[0] == counts[1] > 0


def test_autocast_leaves_the_decoder_alone():
    """On a GPU GroupNorm would write float32 under it."""
    model = rivals.autocast(subjects.subject(64, 1, True)).model
    seen = []
    for network in (model.vae.network, model.predictor):
        for module in network.modules():
            if isinstance(module, nn.GroupNorm | nn.Conv2d):
                module.register_forward_hook(
                    lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
                )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.decode(torch.randn(1, 4, 8, 8))
        assert seen
        assert not any(seen)
        seen.clear()
        model.predictor(torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([0]))
        assert seen == [True]


# Weights


@pytest.mark.parametrize("rival", HERE)
def test_weights_are_in_the_dtypes_that_a_rival_claims(rival):
    """Here of bfloat16 networks, as on a GPU; all rivals are set up in tests/fake_cuda."""
    s = subjects.subject(64, 1, False)
    s = replace(
        s,
        predictor=random_sit(s.predictor.config, 0).bfloat16(),
        refiner=random_sit(s.refiner.config, 1).bfloat16(),
    )
    s = replace(s, dtype=torch.bfloat16)
    model = rivals.RIVALS[rival](s).model
    check_dtypes(rival, model)
    rivals.RIVALS[rival](s)("H1R1")
    assert (
        s.predictor.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    )  # nobody changes what the others read


# Networks


@pytest.mark.parametrize("refiner", [False, True])
def test_the_hoisted_network_is_the_plain_one(refiner):
    network = random_sit(CONFIG.refiner() if refiner else CONFIG, 3).double()
    x, v = torch.randn(2, 3, CONFIG.channels, CONFIG.side, CONFIG.side, dtype=torch.float64)
    t, y = torch.rand(3, dtype=torch.float64), torch.tensor([0, 4, CONFIG.num_classes])
    given = (x, t, y, v) if refiner else (x, t, y)
    hoisted = HoistedSiT(PlainSiT.of(network))
    assert isinstance(hoisted, AdaptiveNetwork)
    assert all(isinstance(block.mlp, FusedMLP) for block in hoisted.network.blocks)
    expected = network(*given)
    assert_close(hoisted(*given), expected, 1e-6)  # its time features are float32
    both = [
        torch.cat([m, m])
        for m in hoisted.modulations(network.t_embedder(t) + network.y_embedder(y))
    ]
    again = hoisted.evaluate(x, both, torch.cat([v, v]) if refiner else None)
    assert_close(again, torch.cat([expected, expected]), 1e-6)
