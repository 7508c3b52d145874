"""Autoencoders: what goes in comes out, scaled latents, and large batches decoded in slices."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from vae_folders import CPU, images, make_folder, relative_error

from flowturbo.models import vae_decoder
from flowturbo.models.vae import VAE, DiffusersVAE, Pixels, in_slices, load_vae
from flowturbo.models.vae_decoder import GroupNormSiLU
from flowturbo.models.vae_fusion import fuse


def test_grey_images_are_their_own_latents() -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(4, 8, 8, 1).expand(-1, -1, -1, 3)
    vae = load_vae("pixels", CPU, torch.float32)
    assert isinstance(vae, VAE)
    latents, std = vae.encode(grey)
    assert (latents.shape, latents.dtype, std) == ((4, 1, 8, 8), torch.float32, None)
    assert (float(latents.min()), float(latents.max())) == (-1, 1)
    assert torch.equal(vae.decode(latents), grey)


def test_colour_images_are_their_own_latents() -> None:
    colour = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8)
    vae = load_vae("rgb", CPU, torch.float32)
    assert isinstance(vae, VAE)
    latents, std = vae.encode(colour)
    assert (latents.shape, latents.dtype, std) == ((4, 3, 8, 8), torch.float32, None)
    expected = colour.permute(0, 3, 1, 2).double() / 127.5 - 1
    assert torch.allclose(latents.double(), expected, rtol=0, atol=2e-7)
    assert torch.equal(vae.decode(latents), colour)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        Pixels(4)


class Identity:
    """A network whose latents are the pixels, to see what happens around it."""

    device, dtype = CPU, torch.float32

    def __init__(self, scale: float, shift: float | None) -> None:
        self.config = SimpleNamespace(
            scaling_factor=scale, shift_factor=shift, latent_channels=3, block_out_channels=(1,)
        )

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mean=pixels, std=torch.ones_like(pixels))
        )

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=z)


@pytest.mark.parametrize(
    "scale, shift", [(0.18215, None), (0.13025, 0.0), (1.5305, 0.0609), (0.3611, 0.1159)]
)
def test_decoding_undoes_encoding(scale: float, shift: float | None) -> None:
    vae = DiffusersVAE(Identity(scale, shift))
    before = images(1, 2, 5, 7)
    mean, std = vae.encode(before)
    assert std is not None
    assert torch.equal(vae.decode(mean), before)
    expected = (before.permute(0, 3, 1, 2).double() / 127.5 - 1 - (shift or 0)) * scale
    assert relative_error(mean, expected) < 1e-6
    assert relative_error(std, torch.full_like(std, scale)) < 1e-6


@pytest.mark.parametrize("config", [{}, {"scaling_factor": 1.5305, "shift_factor": 0.0609}])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_folder_loads_and_agrees_with_diffusers_in_float64(
    tmp_path: Path, config: dict[str, float], as_text: bool
) -> None:
    place = make_folder(tmp_path / "vae", **config)
    vae = load_vae(str(place) if as_text else place, CPU, torch.float32)
    from diffusers import AutoencoderKL

    truth = AutoencoderKL.from_pretrained(place, low_cpu_mem_usage=False).double()
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor", 0.0)
    before = images(2, 3, 16, 24)
    mean, std = vae.encode(before)
    assert std is not None
    with torch.no_grad():
        posterior = truth.encode(before.permute(0, 3, 1, 2).double() / 127.5 - 1).latent_dist
        decoded = truth.decode(mean.double() / scale + shift).sample
    assert mean.shape == std.shape == (3, 4, 8, 12)
    assert mean.dtype == std.dtype == torch.float32
    assert not mean.requires_grad
    assert relative_error(mean, (posterior.mean - shift) * scale) < 1e-5
    assert relative_error(std, posterior.std * scale) < 1e-5
    after = vae.decode(mean)
    assert (after.shape, after.dtype) == ((3, 16, 24, 3), torch.uint8)
    # A value just below a whole number may fall to the one below.
    levels = (127.5 * decoded + 128).clamp(0, 255).permute(0, 2, 3, 1)
    assert ((after - levels).abs() < 1.001).all()
    assert (after.double() == levels.floor().clamp(0, 255)).double().mean() > 0.99


def test_half_precision_is_left_to_devices_that_are_good_at_it(
    folder: Path, tmp_path: Path
) -> None:
    safe = make_folder(tmp_path / "safe", force_upcast=False)
    meta = torch.device("meta")  # stands for an accelerator: it has no numbers, but types
    for place, device, dtype, runs in (
        (folder, CPU, torch.bfloat16, torch.float32),
        (folder, CPU, torch.float16, torch.float32),
        (folder, CPU, torch.float64, torch.float64),
        (folder, meta, torch.bfloat16, torch.bfloat16),
        (
            folder,
            meta,
            torch.float16,
            torch.float32,
        ),  # its configuration says that float16 overflows
        (safe, meta, torch.float16, torch.float16),
    ):
        vae = load_vae(place, device, dtype)
        assert isinstance(vae, DiffusersVAE)
        assert (vae.network.dtype, vae.network.device.type) == (runs, device.type)
        mean, std = vae.encode(images(8, 1, 16, 16))  # from the CPU, wherever the network is
        assert std is not None
        assert (mean.device.type, mean.dtype, std.dtype) == (
            device.type,
            torch.float32,
            torch.float32,
        )
        assert vae.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 16, 16, 3)


def test_latents_of_any_type_decode_alike(folder: Path) -> None:
    vae = load_vae(folder, CPU, torch.float32)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert torch.equal(vae.decode(latents), vae.decode(latents.float()))


def test_shapes_that_do_not_fit_are_refused(folder: Path) -> None:
    vae = load_vae(folder, CPU, torch.float32)
    with pytest.raises(ValueError, match=r"multiples of 2 .* got 17 x 16"):
        vae.encode(images(4, 1, 17, 16))
    with pytest.raises(ValueError, match=r"\(N, 4, H, W\) .* got \(1, 3, 8, 8\)"):
        vae.decode(torch.zeros(1, 3, 8, 8))


def test_pixels_and_diffusers_are_both_vaes(folder: Path) -> None:
    assert isinstance(Pixels(), VAE)
    assert isinstance(load_vae(folder, CPU, torch.float32), VAE)


def test_every_norm_that_silu_follows_is_fused_in_this_instance_only(folder: Path) -> None:
    from diffusers import AutoencoderKL

    stock = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    vae = load_vae(folder, CPU, torch.float32)
    assert isinstance(vae, DiffusersVAE)
    fused = [m for m in vae.network.modules() if isinstance(m, GroupNormSiLU)]
    plain = [m for m in stock.modules() if isinstance(m, torch.nn.GroupNorm)]
    attention = 2  # whose norms no SiLU follows
    assert len(fused) == len(plain) - attention > 10
    assert not any(isinstance(m, GroupNormSiLU) for m in stock.modules())
    ours, theirs = vae.network.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert vae.network.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_fused_decoder_runs_the_librarys_operation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = vae_decoder.group_norm_silu
    monkeypatch.setattr(
        vae_decoder, "group_norm_silu", lambda x, *rest: calls.append(x) or original(x, *rest)
    )
    vae = load_vae(folder, CPU, torch.float32)
    vae.decode(torch.randn(2, 4, 8, 8))
    assert calls
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in calls)


def test_norms_that_other_activations_follow_are_left_alone() -> None:
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,), norm_num_groups=4,
        act_fn="gelu",
    ).eval()  # fmt: skip
    z = torch.randn(1, 4, 8, 8)
    before = network.decode(z).sample.detach()
    fuse(network)
    assert relative_error(network.decode(z).sample.detach(), before) < 1e-6


def peak_of(limit: int, sizes: list[int]):
    """A decoder that runs out of memory above `limit` images."""

    def run(x: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x

    return run


@pytest.mark.parametrize(
    "count, size, limit, expected",
    [
        (10, 99, 99, [10]),
        (10, 4, 99, [4, 4, 2]),
        (10, 99, 5, [10, 5, 5]),
        (10, 4, 3, [4, 2, 2, 2, 2, 2]),
        (3, 99, 1, [3, 2, 1, 1, 1]),
    ],
)
def test_slices_halve_until_they_fit(
    count: int, size: int, limit: int, expected: list[int]
) -> None:
    x, sizes = torch.randn(count, 3), []
    assert torch.equal(in_slices(peak_of(limit, sizes), x, size), 2 * x)
    assert sizes == expected


def test_one_image_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        in_slices(peak_of(0, []), torch.randn(4, 3), 4)


def test_large_batches_are_decoded_in_slices_of_a_fixed_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = load_vae(folder, CPU, torch.float32)
    latents = torch.randn(7, 4, 8, 8)
    whole = vae.decode(latents)
    sizes = []
    original = vae.network.decode
    monkeypatch.setattr(vae.network, "decode", lambda z: sizes.append(len(z)) or original(z))
    one_image = 3 * 16 * (8 * 2) ** 2 * 4  # 16 channels at 16 x 16 pixels, three times, in float32
    monkeypatch.setattr("flowturbo.models.vae.DECODE_BYTES", 3 * one_image)
    parts = vae.decode(latents)
    assert sizes == [3, 3, 1]
    assert (parts.int() - whole.int()).abs().max() <= 1
