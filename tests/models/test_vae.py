"""Autoencoders: what goes in comes out, latents are scaled as the model's configuration says, and
what can't be had is named.
"""

import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowturbo.models import vae as vae_module
from flowturbo.models import vae_fusion as fused_vae
from flowturbo.models.vae import VAE, DiffusersVAE, Pixels, in_slices, load_vae
from flowturbo.models.vae_fusion import GroupNormSiLU, fuse
from flowturbo.storage.files import CheckpointError

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def images(seed: int, count: int, height: int, width: int) -> Tensor:
    return torch.randint(
        256,
        (count, height, width, 3),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.uint8,
    )


def relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def make_folder(path: Path, **config: object) -> Path:
    """A tiny random AutoencoderKL as save_pretrained writes it: 4 channels, half the side."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=4,
            **config,
        )
    network.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("vae") / "sd")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any question to the hub fails the test."""
    hub = pytest.importorskip("huggingface_hub")

    def asked(*args: object, **kwargs: object) -> None:
        pytest.fail(f"the hub was asked: {args}")

    monkeypatch.setattr(hub, "model_info", asked)


def test_grey_images_are_their_own_latents() -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(4, 8, 8, 1).expand(-1, -1, -1, 3)
    vae = load_vae("pixels", CPU, torch.float32)
    assert isinstance(vae, VAE)
    latents, std = vae.encode(grey)
    assert (latents.shape, latents.dtype, std) == ((4, 1, 8, 8), torch.float32, None)
    assert (float(latents.min()), float(latents.max())) == (-1, 1)
    assert torch.equal(vae.decode(latents), grey)


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
    for place, device, asked, runs in (
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
        vae = load_vae(place, device, asked)
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


def test_a_pipelines_folder_is_that_of_its_vae(tmp_path: Path) -> None:
    make_folder(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert isinstance(load_vae(tmp_path, CPU, torch.float32), DiffusersVAE)


def test_published_files_with_the_old_names_of_attention_load(folder: Path, tmp_path: Path) -> None:
    """stabilityai/sd-vae-ft-ema is one."""
    old = {}
    for name, value in load_file(folder / WEIGHTS).items():
        for new, before in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            name = name.replace(f"{new}.", f"{before}.")
        old[name] = value
    assert any("proj_attn" in name for name in old)
    save_file(old, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    image = images(5, 1, 16, 16)
    new, renamed = (
        load_vae(place, CPU, torch.float32).encode(image)[0] for place in (folder, tmp_path)
    )
    assert torch.equal(new, renamed)


def changed(folder: Path, target: Path, change: str) -> Path:
    """A copy of a VAE's folder with one thing wrong in it."""
    state, config = load_file(folder / WEIGHTS), (folder / "config.json").read_text()
    if change == "a key missing":
        del state["quant_conv.weight"]
    if change == "a key too many":
        state["extra.weight"] = torch.zeros(2)
    if change == "a shape":
        state["quant_conv.weight"] = torch.zeros(3, 3, 1, 1)
    if change == "another model's configuration":
        config = json.dumps(json.loads(config) | {"layers_per_block": 2})
    if change == "broken configuration":
        config = config[:-9]
    if change == "means and deviations of latents":
        config = json.dumps(
            json.loads(config) | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
        )
    target.mkdir()
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    if change != "no configuration":
        (target / "config.json").write_text(config)
    if change == "truncated":
        (target / WEIGHTS).write_bytes((target / WEIGHTS).read_bytes()[:-100])
    if change == "empty":
        (target / WEIGHTS).write_bytes(b"")
    if change == "no weights":
        (target / WEIGHTS).unlink()
    return target


@pytest.mark.parametrize(
    "change, error, words",
    [
        ("a key missing", CheckpointError, "lacks quant_conv.weight"),
        ("a key too many", CheckpointError, "no place for extra.weight"),
        ("a shape", CheckpointError, "can't be read"),
        ("another model's configuration", CheckpointError, "lacks"),
        ("broken configuration", CheckpointError, "JSON"),
        ("truncated", CheckpointError, "can't be read"),
        ("empty", CheckpointError, "can't be read"),
        ("no configuration", ValueError, "has no config.json"),
        ("no weights", ValueError, "has no diffusion_pytorch_model.safetensors"),
        ("means and deviations of latents", ValueError, "latents_mean"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_folders_that_are_no_whole_vae_are_refused(
    folder: Path, tmp_path: Path, change: str, error: type[ValueError], words: str
) -> None:
    place = changed(folder, tmp_path / "bad", change)
    with pytest.raises(error, match=words) as caught:
        load_vae(place, CPU, torch.float32)
    if change != "means and deviations of latents":
        assert str(place) in str(caught.value)


class Canary:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_pickled_weights_are_not_read_and_the_message_tells_how_to_convert_them(
    folder: Path, tmp_path: Path
) -> None:
    place = changed(folder, tmp_path / "pickled", "no weights")
    pickled, canary = place / "diffusion_pytorch_model.bin", tmp_path / "canary"
    pickled.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ValueError, match="a pickle, which is not read") as caught:
        load_vae(place, CPU, torch.float32)
    assert not canary.exists()

    torch.save(load_file(folder / WEIGHTS), pickled)
    command = str(caught.value).partition("convert it once: ")[2]
    from diffusers import AutoencoderKL

    eval(command, {"AutoencoderKL": AutoencoderKL})
    image = images(6, 1, 16, 16)
    converted, original = (
        load_vae(p, CPU, torch.float32).encode(image)[0] for p in (place, folder)
    )
    assert torch.equal(converted, original)


@pytest.mark.usefixtures("no_network")
def test_a_mistyped_path_is_not_taken_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file.safetensors").touch()
    names = [
        "./vae",
        "../vae",
        "/no/such/vae",
        "~/no-such-folder-here",
        "vae",
        "models/vae",
        "models",
        "file.safetensors",
        "",
    ]
    for name in [*names, Path("org/name"), tmp_path / "vae"]:
        began = time.perf_counter()
        with pytest.raises(ValueError, match="vae must be") as caught:
            load_vae(name, CPU, torch.float32)
        assert not isinstance(caught.value, CheckpointError)
        assert time.perf_counter() - began < 1


def test_a_name_without_a_network_fails_soon_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.hf_api.api, "endpoint", "http://127.0.0.1:9")  # where nobody answers
    began = time.perf_counter()
    with pytest.raises(
        ValueError, match=r"'org/name' .* can't be had from the hub: .*\w"
    ) as caught:
        load_vae("org/name", CPU, torch.float32)
    assert time.perf_counter() - began < 12
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name, inside", [("org/name", "."), ("org/name/vae", "vae")])
def test_what_was_downloaded_before_needs_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inside: str
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit = tmp_path / "cache/models--org--name", "0" * 40
    place = repository / "snapshots" / commit / inside
    place.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    image = images(7, 1, 16, 16)
    got, expected = (load_vae(n, CPU, torch.float32).encode(image)[0] for n in (name, folder))
    assert torch.equal(got, expected)


def test_pixels_and_diffusers_are_both_vaes(folder: Path) -> None:
    assert isinstance(Pixels(), VAE)
    assert isinstance(load_vae(folder, CPU, torch.float32), VAE)


# Kernels in the decoder


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
    original = fused_vae.group_norm_silu
    monkeypatch.setattr(
        fused_vae, "group_norm_silu", lambda x, *rest: calls.append(x) or original(x, *rest)
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


# Slices


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
    monkeypatch.setattr(vae_module, "DECODE_BYTES", 3 * one_image)
    parts = vae.decode(latents)
    assert sizes == [3, 3, 1]
    assert (parts.int() - whole.int()).abs().max() <= 1


# The tiny autoencoder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderTiny as save_pretrained writes it: 4 channels, an eighth of the side, as
    TAESD's.
    """
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
        )
    place = tmp_path_factory.mktemp("taesd")
    network.save_pretrained(place)
    return place


def test_the_tiny_autoencoder_takes_scaled_latents(tiny: Path) -> None:
    from diffusers import AutoencoderTiny

    vae = load_vae(tiny, CPU, torch.float32)
    assert isinstance(vae, VAE)
    truth = AutoencoderTiny.from_pretrained(tiny, low_cpu_mem_usage=False).double()
    before = images(9, 2, 16, 24)
    mean, std = vae.encode(before)
    with torch.no_grad():
        latents = truth.encode(before.permute(0, 3, 1, 2).double() / 127.5 - 1).latents
        decoded = truth.decode(latents).sample
    assert (mean.shape, std) == ((2, 4, 2, 3), None)
    assert relative_error(mean, latents) < 1e-5
    levels = (127.5 * decoded + 128).clamp(0, 255).permute(0, 2, 3, 1)
    assert ((vae.decode(mean) - levels).abs() < 1.001).all()
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(images(10, 1, 12, 16))


def test_a_tiny_autoencoder_lacking_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    state = load_file(tiny / WEIGHTS)
    del state[name := max(state)]
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"no AutoencoderTiny .* lacks {name}"):
        load_vae(tmp_path, CPU, torch.float32)


def test_another_kind_of_model_is_named(folder: Path, tmp_path: Path) -> None:
    place = changed(folder, tmp_path / "other", "nothing")
    config = json.loads((place / "config.json").read_text()) | {"_class_name": "AutoencoderDC"}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError,
        match="of the kind AutoencoderDC, not one of AutoencoderKL, AutoencoderTiny",
    ):
        load_vae(place, CPU, torch.float32)
