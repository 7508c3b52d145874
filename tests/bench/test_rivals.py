"""Rivals are set up as well as their users would, on the same inputs, and each is held against the
limit that is its own.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from types import ModuleType

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
from flowturbo.models.sit import SIT_CONFIGS
from flowturbo.models.vae import DiffusersVAE
from flowturbo.sampling.run import Job
from flowturbo_kernels import quantize_rows

sys.path.insert(0, str(ROOT / "bench"))

import inductor
import rivals
import roofline
import rowwise
import sampling
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
    s = rivals.subject(64, 3, False)
    sampler = rivals.RIVALS[rival](s)
    seen = []
    run = Job.run

    def watched(self, model, inputs, guidance, monitor):
        seen.append((str(self.plan), inputs, guidance))
        return run(self, model, inputs, guidance, monitor)

    monkeypatch.setattr(Job, "run", watched)
    assert sampler("H1R1").shape == s.noise.shape
    [(plan, inputs, guidance)] = seen
    assert (plan, guidance) == ("H1R1", rivals.GUIDANCE)
    assert inputs["noise"] is s.noise
    assert inputs["labels"] is s.labels


@pytest.mark.parametrize("rival", HERE)
def test_a_call_copies_nothing_from_the_host_and_reads_nothing_from_the_device(rival):
    """On a GPU both would wait for it: noise made on the CPU, rows chosen by the CPU, a number
    looked at.
    """
    sampler = rivals.RIVALS[rival](rivals.subject(64, 2, False))
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
    s = rivals.subject(64, 2, False)
    model = ft.load(s.predictor, s.refiner, device="cpu", dtype=torch.float32)
    assert s.noise.shape == (2, 4, 8, 8)
    expected = ft.sample(model, "E1", [0, 1], guidance=rivals.GUIDANCE, seed=0)
    assert rivals.eager(s)("E1").sub(expected).abs().max() < 1e-5


def recorded(s: rivals.Subject, hoisted: bool) -> tuple[sampling.Sampler, Fake]:
    """plan-graph as it is but for what compiles and captures."""
    wrap = HoistedSiT if hoisted else rivals._as_it_is
    model, _ = rivals._plain(s, wrap, rivals._decoder_of(s))
    model.captures.recorder = recorder = Fake()
    return sampling.captured(s, model, kind=sampling.AnyJob), recorder


@pytest.mark.parametrize("hoisted", [False, True], ids=["plan-graph", "plan-graph-hoisted"])
@pytest.mark.parametrize("decode", [False, True], ids=["latents", "images"])
def test_whole_plans_of_plain_networks_are_captured_once_and_replayed(hoisted, decode):
    s = rivals.subject(64, 2, decode)
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
    sampler, recorder = recorded(rivals.subject(64, 1, False), hoisted=False)
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
    s = rivals.subject(64, 2, True)
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
    s = rivals.subject(64, 2, True)
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
    network = rivals.autocast(rivals.subject(64, 2, False)).model.predictor
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
    sampler = rivals.autocast(rivals.subject(64, 2, False))
    counts = []
    for plan in ("E1", "E3"):
        with Casts(sampler.model.predictor) as casts:
            assert not sampler(plan).requires_grad
        counts.append(casts.count)
    assert counts[0] == counts[1] > 0


def test_autocast_leaves_the_decoder_alone():
    """On a GPU GroupNorm would write float32 under it."""
    model = rivals.autocast(rivals.subject(64, 1, True)).model
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
    s = rivals.subject(64, 1, False)
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


def scaled_product_by_rows(q, weight, scale, weight_scale, bias, out_dtype, use_fast_accum):
    """As torch._scaled_mm is on a GPU; on the CPU older ones have one scale only."""
    assert q.dtype == weight.dtype == torch.float8_e4m3fn
    assert (scale.shape, weight_scale.shape) == ((len(q), 1), (1, weight.shape[1]))
    assert scale.dtype == weight_scale.dtype == torch.float32
    assert scale.is_contiguous()
    assert weight_scale.is_contiguous()
    assert bias.dtype == out_dtype
    return ((q.float() @ weight.float()) * scale * weight_scale + bias.float()).to(out_dtype)


def test_plain_fp8_has_a_scale_a_row_as_ours_has():
    rows = torch.randn(5, 32) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 3.0])[:, None]
    for given in (rows, rows.bfloat16()):
        (q, scale), (expected, scales) = rowwise._quantised(given), quantize_rows(given)
        assert q.view(torch.uint8).equal(expected.view(torch.uint8))
        assert scale.equal(scales[:, None])


def test_plain_fp8_errs_as_ours_does(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_product_by_rows)
    monkeypatch.setitem(sys.modules, "torchao", None)
    config = replace(CONFIG, hidden=96, heads=4)
    sit = random_sit(config, 5).bfloat16()
    plain = PlainSiT.of(sit)
    x, t, y = torch.randn(3, 4, 8, 8).bfloat16(), torch.rand(3), torch.tensor([0, 1, 2])
    exact = plain(x, t, y).float()
    assert rowwise.quantise(plain) == "row-wise fp8 by torch._scaled_mm"
    assert (
        len([m for m in plain.modules() if isinstance(m, rowwise.RowwiseLinear)])
        == 4 * config.depth
    )
    error = (plain(x, t, y).float() - exact).norm() / exact.norm()
    ours = (sit.quantize_()(x, t, y).float() - exact).norm() / exact.norm()
    assert 0 < error < 1.5 * ours
    fused = HoistedSiT(plain)
    assert_close(fused(x, t, y).float(), plain(x, t, y).float(), 0.02)


def test_torchaos_layers_are_taken_where_it_is(monkeypatch):
    """All four products of each block, and no other."""
    taken = []
    quantization = ModuleType("torchao.quantization")

    def quantize_(network, config, filter_fn):
        taken.extend(name for name, layer in network.named_modules() if filter_fn(layer, name))
        assert config == ("rows",)

    quantization.quantize_ = quantize_
    quantization.PerRow = lambda: "rows"
    quantization.Float8DynamicActivationFloat8WeightConfig = lambda granularity: (granularity,)
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    monkeypatch.setattr(rowwise, "version", lambda name: "9.9")
    assert rowwise.quantise(PlainSiT.of(random_sit(CONFIG, 0))) == "row-wise fp8 by torchao 9.9"
    assert taken == [
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]


def test_no_quantised_product_does_the_gelu():
    """torchao's layers are still nn.Linear: what their weights are tells."""

    class Quantised(torch.Tensor):
        pass

    layers = [nn.Linear(8, 32), nn.Linear(8, 32)]
    layers[1].weight = nn.Parameter(
        layers[1].weight.detach().as_subclass(Quantised), requires_grad=False
    )
    assert isinstance(layers[1].weight, Quantised)
    fused = [
        FusedMLP(layer, nn.Linear(32, 8)).fused
        for layer in (*layers, rowwise.RowwiseLinear(layers[0]))
    ]
    assert fused == [True, False, False]


@pytest.mark.parametrize("rival", ["ours-fp8", "max-autotune-fp8", "plan-graph-fp8"])
def test_fp8_is_refused_below_sm_89(rival, monkeypatch):
    s = rivals.subject(64, 1, False)
    s = replace(s, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(
        rivals.Unavailable, match="need a GPU of sm_89 or later, and this one is sm_80"
    ):
        rivals.RIVALS[rival](s)
    if rival != "ours-fp8":
        with pytest.raises(rivals.Unavailable, match="need a GPU of sm_89 or later"):
            rivals.RIVALS[rival](rivals.subject(64, 1, False))


# Settings of torch.compile


def test_the_best_settings_are_those_of_one_compilation(monkeypatch):
    from torch._inductor import config

    before = config.get_config_copy()
    given = {}
    monkeypatch.setattr(
        torch, "compile", lambda network, **options: given.update(options) or network
    )
    for graphs in (True, False):
        compiled, said = inductor.best(graphs)
        compiled(nn.Identity())
        options = given["options"]
        assert (
            options["triton.enable_persistent_tma_matmul"] is options["triton.enable_pdl"] is True
        )
        assert options["max_autotune"] is options["coordinate_descent_tuning"] is True
        assert options.get("triton.cudagraphs", False) is graphs
        assert "max_autotune_gemm_search_space" not in options
        assert (given["fullgraph"], given["dynamic"]) == (True, False)
        assert said == (
            f"max-autotune{'' if graphs else '-no-cudagraphs'}, "
            "triton.enable_persistent_tma_matmul=True, triton.enable_pdl=True"
        )
    assert config.get_config_copy() == before


def test_settings_that_this_torch_lacks_are_left_out_and_named(monkeypatch):
    given = {}
    monkeypatch.setattr(
        torch, "compile", lambda network, **options: given.update(options) or network
    )
    monkeypatch.setattr(
        inductor, "OPTIONS", {"triton.enable_pdl": True, "triton.enable_magic": True}
    )
    compiled, said = inductor.best(graphs=False)
    compiled(nn.Identity())
    assert "triton.enable_magic" not in given["options"]
    assert said.endswith(
        f"triton.enable_pdl=True, no triton.enable_magic in torch {torch.__version__}"
    )


@pytest.mark.parametrize("cutlass", [False, True])
def test_an_exhaustive_search_is_asked_for(cutlass, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(
        torch, "compile", lambda network, **options: given.update(options) or network
    )
    monkeypatch.setenv(inductor.EXHAUSTIVE, "1")
    monkeypatch.setattr(
        inductor, "no_cutlass", lambda: None if cutlass else "nvcc is not installed"
    )
    compiled, said = inductor.best(graphs=True)
    compiled(nn.Identity())
    assert given["options"]["max_autotune_gemm_search_space"] == "EXHAUSTIVE"
    assert given["options"].get("max_autotune_gemm_backends") == (
        "ATEN,TRITON,CUTLASS" if cutlass else None
    )
    assert ("no CUTLASS (nvcc is not installed)" in said) is not cutlass


def test_why_there_is_no_cutlass(monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setattr(inductor.shutil, "which", lambda name: None)
    assert inductor.no_cutlass() == "nvcc is not installed"
    monkeypatch.setattr(inductor.shutil, "which", lambda name: "/usr/bin/nvcc")
    place = getattr(config, "cutlass", None) or config.cuda
    with monkeypatch.context() as patch:
        patch.setattr(place, "cutlass_dir", str(tmp_path / "cutlass"))
        assert inductor.no_cutlass() == "no CUTLASS in cutlass"
        (tmp_path / "cutlass" / "python" / "cutlass_library").mkdir(parents=True)
        assert inductor.no_cutlass() is None


# What is sampled


def test_trial_runs_are_shorter_and_say_so(monkeypatch):
    assert rivals.subject(64, 1, False).about == {"depth": 2, "decoder": "small"}
    monkeypatch.setenv(rivals.DEPTH, "3")
    s = rivals.subject(64, 1, False)
    assert s.about["depth"] == len(s.predictor.blocks) == 3
    for text in ("0", "-1", "x", "1.5"):
        monkeypatch.setenv(rivals.DEPTH, text)
        with pytest.raises(
            ValueError, match=f"{rivals.DEPTH} must be a number of blocks, at least 1, got '{text}'"
        ):
            rivals.subject(64, 1, False)
    monkeypatch.delenv(rivals.DEPTH)
    monkeypatch.setenv(rivals.DECODER, "tiny")
    with pytest.raises(ValueError, match=f"{rivals.DECODER} must be 'full' or 'small', got 'tiny'"):
        rivals.subject(64, 1, False)


def test_the_decoder_of_a_gpu_is_the_published_one_unless_a_small_one_is_asked_for(monkeypatch):
    asked = []
    cpu = rivals.networks(64, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rivals, "networks", lambda *arguments: asked.append(arguments) or cpu)
    assert rivals.subject(64, 1, True).about["decoder"] == "full"
    monkeypatch.setenv(rivals.DECODER, "small")
    monkeypatch.setenv(rivals.DEPTH, "5")
    assert rivals.subject(64, 1, True).decoder == "small"
    assert asked == [(64, True, None, "full"), (64, True, 5, "small")]


# Limits


@pytest.mark.parametrize("side, predictor, refiner", [(32, 237.243, 8.518), (64, 1049.08, 37.62)])
def test_calls_of_the_published_model_are_as_counted(side, predictor, refiner):
    """GFLOP of one sample, counted by hand."""
    config = replace(SIT_CONFIGS["SiT-XL/2"], side=side)
    assert 2 * config.macs() / 1e9 == pytest.approx(predictor, rel=2e-5)
    assert 2 * config.refiner().macs() / 1e9 == pytest.approx(refiner, rel=1e-4)


@functools.cache
def published_decoder() -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder().bfloat16()


@pytest.mark.parametrize("side, written, cheapest", [(32, 622.19, 525.6), (64, 2514.52, 2128.0)])
def test_decoding_is_as_counted(side, written, cheapest):
    """GFLOP of one image: as written, and with each convolution of a doubled image as four 2x2 ones
    of the small one.
    """
    vae = published_decoder()
    assert roofline.decode_flops(vae, (1, 4, side, side), doubled=False) / 1e9 == pytest.approx(
        written, rel=1e-5
    )
    assert roofline.decode_flops(vae, (1, 4, side, side)) / 1e9 == pytest.approx(cheapest, rel=1e-4)
    assert not any(m._forward_hooks for m in vae.modules())


def test_four_convolutions_of_the_small_image_do_what_one_of_the_doubled_does():
    """What the limit counts on."""
    x, weight = (
        torch.randn(2, 3, 5, 6, dtype=torch.float64),
        torch.randn(4, 3, 3, 3, dtype=torch.float64),
    )
    doubled = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = nn.functional.conv2d(doubled, weight, padding=1)
    made = torch.empty_like(expected)
    first = {
        0: ([0], [1, 2]),
        1: ([0, 1], [2]),
    }  # of an even and an odd row: which taps fall on the first and second small row
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    for i in (0, 1):
        for j in (0, 1):
            taps = torch.stack(
                [
                    torch.stack([weight[:, :, a][..., b].sum((2, 3)) for b in first[j]], dim=-1)
                    for a in first[i]
                ],
                dim=-2,
            )
            made[..., i::2, j::2] = nn.functional.conv2d(padded, taps)[..., i : i + 5, j : j + 6]
    assert_close(made, expected, 1e-12)


HOPPER = {"copy": 4.3e12, "float32": 1e12, "bfloat16": 790e12, "float8_e4m3fn": 1480e12}


def limit(monkeypatch, rival: str, batch: int = 8) -> float:
    """ms an image of H1P5R3 with decoding, by SiT-XL/2 at 256 x 256."""
    monkeypatch.setattr(roofline, "ceilings", lambda device: HOPPER)
    with torch.device("meta"):
        xl = ft.models.sit.SiT(SIT_CONFIGS["SiT-XL/2"])
        refiner = ft.models.sit.SiT(xl.config.refiner())
    noise = torch.empty(batch, 4, 32, 32, device="meta")
    s = rivals.Subject(
        xl,
        refiner,
        published_decoder(),
        torch.device("cuda"),
        torch.bfloat16,
        batch,
        True,
        "full",
        noise,
        noise[:, 0, 0, 0],
    )
    return 1e3 * rivals.limit_of(rival, "H1P5R3", s) / batch


@pytest.mark.parametrize("rival", list(rivals.RIVALS))
def test_every_rival_has_the_limit_of_its_dtype(rival, monkeypatch):
    """14 rows of 237 GFLOP, 12 of 8.5 and 525.6 of decoding take 5.00 ms in bfloat16, and where 14
    times 228 are in fp8 3.1.
    """
    found = limit(monkeypatch, rival)
    assert found == pytest.approx(3.11 if rival.endswith("fp8") else 5.00, rel=0.01)


def test_at_batch_one_weights_are_read_in_their_dtype(monkeypatch):
    slow = HOPPER | {"copy": 4.3e10}
    monkeypatch.setitem(HOPPER, "copy", slow["copy"])
    assert limit(monkeypatch, "ours", 1) > 1.7 * limit(monkeypatch, "ours-fp8", 1)


def test_a_limit_is_of_a_rival_there_is():
    with pytest.raises(ValueError, match=r"rival must be one of ours, .*, got 'theirs'"):
        rivals.limit_of("theirs", "H1", rivals.subject(64, 1, False))
    assert "boost clocks" in roofline.LIMIT


def test_counting_takes_none_of_the_decoders_memory():
    vae = Autoencoder((16, 16, 32, 32), 1, 8)
    pointers = {p.data_ptr() for p in vae.parameters()}
    roofline.decode_flops(vae, (1, 4, 8, 8))
    assert {p.data_ptr() for p in vae.parameters()} == pointers
    assert all(p.device.type == "cpu" for p in vae.parameters())
