"""The decoder in few passes: what it computes, and when the plain one runs instead."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ops import poison_new_memory
from paths import ROOT
from torch import Tensor, nn
from vae_folders import CPU, relative_error

from flowturbo.models import vae_decoder
from flowturbo.models.hooks import untouched
from flowturbo.models.vae import load_vae
from flowturbo.models.vae_decoder import FusedDecoder, fits
from flowturbo.models.vae_fusion import fuse
from flowturbo.runtime.cuda_graphs import addresses
from flowturbo_kernels import use_backend

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU"
)


def autoencoder(dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A small AutoencoderKL of diffusers: 3 levels, so both kinds of shortcut and two doublings."""
    diffusers = pytest.importorskip("diffusers")
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 32),
        "norm_num_groups": 8,
        "latent_channels": 4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = diffusers.AutoencoderKL(**settings | config).eval().requires_grad_(False)
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):  # whose weights and biases are 1 and 0 at first
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
    return network.to(dtype)


def latents(N: int, H: int, W: int, dtype: torch.dtype) -> Tensor:
    z = torch.randn(N, 4, H, W, generator=torch.Generator().manual_seed(H))
    return z.to(dtype, memory_format=torch.channels_last)


def fused(network: Any) -> Any:
    network = copy.deepcopy(network)
    fuse(network)
    assert isinstance(network.decoder, FusedDecoder)
    return network


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 5, 7), (1, 1, 3)])
def test_it_is_diffusers_decoder_in_float64(size: tuple[int, int, int]) -> None:
    plain = autoencoder()
    decoder = fused(plain).decoder
    z = latents(*size, torch.float64)
    assert relative_error(decoder.in_few_passes(z), plain.decoder(z)) < 1e-13


def test_it_is_that_of_the_benchmarks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from decoder import Autoencoder

    plain = Autoencoder((8, 16), layers=1, groups=4).double().eval().requires_grad_(False)
    decoder = fused(plain).decoder
    z = latents(1, 6, 4, torch.float64)
    assert relative_error(decoder.in_few_passes(z), plain.decoder(z)) < 1e-13


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_on_triton_it_errs_at_most_twice_as_much_as_diffusers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = autoencoder(dtype)
    network, truth_of = fused(plain), copy.deepcopy(plain).double()
    poison_new_memory(monkeypatch)
    for size in ((1, 4, 4), (2, 3, 5)):
        z = latents(*size, dtype)
        truth, theirs = truth_of.decode(z.double()).sample, plain.decode(z).sample
        with use_backend("triton"):
            assert network.decoder.suits(z)
            got = network.decode(z).sample
        assert got.dtype == dtype
        assert got.shape == truth.shape
        assert relative_error(got, truth) <= 2 * relative_error(theirs, truth)


@interpreted
def test_triton_runs_a_whole_autoencoder_of_a_folder(folder: Path) -> None:
    vae = load_vae(folder, CPU, torch.float32)
    z = torch.randn(1, 4, 4, 4)
    plain = vae.decode(z)
    with use_backend("triton"):
        got = vae.decode(z)
    assert got.shape == (1, 8, 8, 3)
    assert (got.int() - plain.int()).abs().max() <= 1


def test_on_the_cpu_the_plain_decoder_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit as ever: norms, activations and convolutions of torch, one after the other."""
    network = fused(autoencoder(torch.float32))
    monkeypatch.setattr(FusedDecoder, "in_few_passes", lambda *_: pytest.fail("it ran"))
    z = latents(2, 4, 4, torch.float32)
    assert not network.decoder.suits(z)
    expected = autoencoder(torch.float32)
    fuse(expected)
    assert torch.equal(network.decoder(z), expected.decoder._plain[0](z))


@interpreted
def test_when_the_plain_decoder_runs_though_triton_is_asked_for() -> None:
    z = latents(1, 4, 4, torch.float32)

    def suits(change: Any = lambda network: None, z: Tensor = z) -> bool:
        network = fused(autoencoder(torch.float32))
        change(network)
        with use_backend("triton"):
            return bool(network.decoder.suits(z))

    def with_hook(network: Any) -> None:
        network.decoder.conv_out.register_forward_hook(lambda *_: None)

    def with_own_forward(network: Any) -> None:
        conv = network.decoder.up_blocks[0].resnets[0].conv1
        conv.forward = conv.forward

    def with_adapter(network: Any) -> None:
        network.decoder.mid_block.attentions[0].to_q = nn.Sequential(nn.Linear(32, 32))

    assert suits()
    assert not suits(with_hook)
    assert not suits(with_own_forward)
    assert not suits(with_adapter)
    assert not suits(lambda network: network.decoder.conv_in.weight.requires_grad_())
    assert not suits(z=z.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits()
    hooks = []

    def with_hook_of_all(_: Any) -> None:
        hooks.append(nn.modules.module.register_module_forward_hook(lambda *_: None))

    try:
        assert not suits(with_hook_of_all)
    finally:
        hooks[0].remove()
    assert suits()


@interpreted
@pytest.mark.parametrize("copied", [lambda network: network, copy.deepcopy])
def test_an_exchanged_part_runs_in_both_decoders(copied: Any) -> None:
    network = copied(fused(autoencoder(torch.float32)))
    z = latents(1, 4, 4, torch.float32)
    before = network.decoder(z)
    network.decoder.conv_out = copy.deepcopy(network.decoder.conv_out)
    network.decoder.conv_out.weight.mul_(2)
    network.decoder.conv_out.bias.mul_(2)
    plain = network.decoder(z)
    with use_backend("triton"):
        few = network.decoder(z)
    assert relative_error(plain, 2 * before) < 1e-6
    assert relative_error(few, 2 * before) < 1e-5


@interpreted
def test_gradients_are_those_of_the_plain_decoder() -> None:
    plain = autoencoder(torch.float32)
    network = fused(plain)
    mine, theirs = (latents(1, 4, 4, torch.float32).requires_grad_() for _ in range(2))
    with use_backend("triton"):
        network.decoder(mine).square().sum().backward()
    plain.decoder(theirs).square().sum().backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    assert relative_error(mine.grad, theirs.grad) < 1e-5


@interpreted
def test_under_torch_compile_the_plain_decoder_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    network = fused(autoencoder(torch.float32))
    z = latents(1, 4, 4, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(network.decoder, backend="eager", fullgraph=True)
    with use_backend("triton"), torch.no_grad():
        assert network.decoder.suits(z)
        monkeypatch.setattr(FusedDecoder, "in_few_passes", None)
        got = compiled(z)
    assert relative_error(got, network.decoder._plain[0](z)) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"mid_block_add_attention": False},
        {"layers_per_block": 2, "block_out_channels": (16, 24, 48)},
        {"use_post_quant_conv": False},
    ],
)
def test_other_configurations_that_fit(config: dict[str, Any]) -> None:
    plain = autoencoder(**config)
    z = latents(1, 4, 6, torch.float64)
    assert relative_error(fused(plain).decoder.in_few_passes(z), plain.decoder(z)) < 1e-13


def changed(change: Any) -> Any:
    network = autoencoder()
    change(network.decoder)
    return network


def test_decoders_that_are_something_else_are_left_alone() -> None:
    diffusers = pytest.importorskip("diffusers")

    def set_on(path: str, **values: Any) -> Any:
        def change(decoder: nn.Module) -> None:
            for name, value in values.items():
                setattr(decoder.get_submodule(path), name, value)

        return changed(change)

    block, attention = "up_blocks.0.resnets.1", "mid_block.attentions.0"
    processors = diffusers.models.attention_processor
    for network in (
        autoencoder(act_fn="gelu"),
        set_on(block, output_scale_factor=2.0),
        set_on(block, conv1=nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")),
        set_on(block, conv2=nn.Conv2d(32, 32, 3, padding=1, bias=False)),
        set_on(block, dropout=nn.Dropout(0.5)),
        set_on(attention, processor=processors.AttnProcessor()),
        set_on(attention, rescale_output_factor=2.0),
        set_on(attention, heads=2),
        set_on("up_blocks.0.upsamplers.0", interpolate=False),
        set_on("", conv_act=nn.ReLU()),
        diffusers.AutoencoderTiny(),
    ):
        fuse(network)
        assert not isinstance(network.decoder, FusedDecoder)
    assert not fits(nn.Linear(2, 2))
    assert untouched(autoencoder().decoder)


def test_its_state_is_that_of_the_plain_decoder_and_it_can_be_copied() -> None:
    plain = autoencoder()
    network = fused(plain)
    before, after = plain.state_dict(), network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    z = latents(1, 4, 4, torch.float64)
    expected = network.decoder(z)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network.decoder))):
        other = getattr(other, "decoder", other)
        assert torch.equal(other(z), expected)
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(z).any()  # the plain one has the same parameters
        assert not other.in_few_passes(z).any()
    assert torch.equal(network.decoder(z), expected)
    fuse(network)
    assert isinstance(network.decoder._plain[0], type(plain.decoder))  # once, not twice


def test_summed_weights_follow_their_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are buffers, whose addresses captures watch, in no state dict."""
    decoder = fused(autoencoder(torch.float32)).decoder
    conv = decoder.up_blocks[0].upsamplers[0].conv
    assert decoder._summed_weights("0", conv.weight) is None  # not on the CPU
    made: list[Tensor] = []
    original = vae_decoder.summed_weights
    monkeypatch.setattr(
        vae_decoder, "summed_weights", lambda weight: made.append(original(weight)) or made[-1]
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(vae_decoder, "_has_candidates", lambda weight: True)
    first = decoder._summed_weights("0", conv.weight)
    assert first is decoder._summed_weights("0", conv.weight) is made[0]
    assert not any("summed" in name for name in decoder.state_dict())
    assert [name for name, _ in decoder.named_buffers()] == ["summed_0"]
    watched = addresses([decoder])
    assert addresses([decoder]) == watched
    with torch.no_grad():
        conv.weight.mul_(2)
    assert addresses([decoder]) != watched  # a captured run would read the sums of before
    second = decoder._summed_weights("0", conv.weight)
    assert torch.equal(second, 2 * first)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad():
        conv.weight.mul_(2)
    assert decoder._summed_weights("0", conv.weight) is None  # nothing is made in a capture
