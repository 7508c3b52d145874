"""Files that we write: bit for bit, converted from others, and refused at any damage."""

import contextlib
import itertools
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from close import assert_close
from published_checkpoints import (
    HEADS,
    agrees,
    inputs,
    predictor_state,
    refiner_state,
    sit,
    train_file,
)

import flowturbo as ft
from flowturbo.models.checkpoint import build, convert, load_sit, save_sit
from flowturbo.models.sit import SiT, SiTConfig, config_from_state
from flowturbo.storage.files import CheckpointError, save_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*label table")


def test_files_of_ours_know_their_heads(tmp_path):
    state = predictor_state()
    save_sit(tmp_path / "a.safetensors", build(config_from_state(state, heads=HEADS), state))
    assert load_sit(tmp_path / "a.safetensors", "predictor").model.config.heads == HEADS
    assert agrees(load_sit(tmp_path / "a.safetensors", "predictor", heads=HEADS).model, state)
    with pytest.raises(CheckpointError, match="heads=2 was asked for, but the file says 4"):
        load_sit(tmp_path / "a.safetensors", "predictor", heads=2)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize(
    "reads_velocity, learned_sigma", list(itertools.product([False, True], repeat=2))
)
def test_a_round_trip_is_bit_for_bit(tmp_path, reads_velocity, learned_sigma, dtype):
    config = SiTConfig(hidden=24, depth=2, heads=3, patch=2, side=6, channels=2, num_classes=4)
    config = replace(config, reads_velocity=reads_velocity, learned_sigma=learned_sigma)
    model = SiT(config).to(dtype)
    provenance = {"settings": {"lr": 1e-4, "name": "ü\n"}, "steps": 7, "note": None}
    save_sit(
        tmp_path / "a.safetensors", model, convention="repa", vae="pixels", provenance=provenance
    )
    loaded = load_sit(tmp_path / "a.safetensors", "refiner" if reads_velocity else "predictor")
    assert loaded.model.config == config
    assert (loaded.convention, loaded.vae, loaded.provenance) == ("repa", "pixels", provenance)
    before, after = model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].dtype == dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


def test_a_vae_named_in_the_file_is_used(tmp_path):
    save_sit(tmp_path / "a.safetensors", sit(channels=1), vae="pixels")
    model = ft.load(tmp_path / "a.safetensors", device="cpu")
    assert model.decode(torch.zeros(2, 1, 8, 8)).shape == (2, 8, 8, 3)
    save_sit(tmp_path / "b.safetensors", sit(channels=1))
    with pytest.raises(ValueError, match="decode needs a vae"):
        ft.load(tmp_path / "b.safetensors", device="cpu").decode(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_conversion_keeps_the_model(tmp_path, dtype):
    state = predictor_state(21)
    torch.save(train_file(predictor_state(22), state), tmp_path / "0050000.pt")
    convert(
        tmp_path / "0050000.pt",
        tmp_path / "b.safetensors",
        heads=HEADS,
        vae="stabilityai/sd-vae-ft-ema",
        dtype=dtype,
    )
    converted = load_sit(tmp_path / "b.safetensors", "predictor")
    kept = {k: v.to(dtype or v.dtype) for k, v in state.items()}
    assert converted.model.state_dict().keys() == kept.keys()
    assert all(torch.equal(v, kept[k]) for k, v in converted.model.state_dict().items())
    assert converted.vae == "stabilityai/sd-vae-ft-ema"
    assert converted.provenance == {"source": "0050000.pt"}
    assert (tmp_path / "b.safetensors").stat().st_size < 1.2 * sum(
        v.nbytes for v in kept.values()
    ) + 10_000
    x, t, y = inputs(8)
    got, truth = (
        load_sit(tmp_path / n, "predictor", heads=HEADS).model.float()(x, t, y)
        for n in ("b.safetensors", "0050000.pt")
    )
    assert_close(got, truth, 0.0 if dtype is None else 0.03)


def test_conversion_of_a_refiner_and_its_refusals(tmp_path):
    torch.save(refiner_state(23), tmp_path / "r.pt")
    convert(tmp_path / "r.pt", tmp_path / "r.safetensors", role="refiner", heads=HEADS)
    assert agrees(load_sit(tmp_path / "r.safetensors", "refiner").model, refiner_state(23))
    with pytest.raises(CheckpointError):
        convert(tmp_path / "r.pt", tmp_path / "p.safetensors", heads=HEADS)
    with pytest.raises(ValueError, match=r"target must end in .safetensors, got .*b\.pt"):
        convert(tmp_path / "r.pt", tmp_path / "b.pt", role="refiner", heads=HEADS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.pt", "r.safetensors"]


GOOD = {"format": 1, "role": "predictor", "convention": "sit", "vae": None, "provenance": {}}
CONFIG = dict(
    hidden=32,
    depth=1,
    heads=2,
    patch=2,
    side=8,
    channels=4,
    num_classes=10,
    learned_sigma=True,
    reads_velocity=False,
)

DESCRIBED = {**GOOD, "config": CONFIG}
OTHER_DESCRIPTIONS = {
    "a training state": ({"kind": "training state", "step": 3, "settings": {}}, "training state"),
    "a later format": ({**DESCRIBED, "format": 2}, "format 1 .*2"),
    "empty": ({}, "format"),
    "no config": (GOOD, "format|config"),
    "no role": ({k: v for k, v in DESCRIBED.items() if k != "role"}, "role|a None"),
    "no convention": ({k: v for k, v in DESCRIBED.items() if k != "convention"}, "convention"),
    "an unknown convention": ({**DESCRIBED, "convention": "ddpm"}, "convention"),
    "another width": ({**GOOD, "config": {**CONFIG, "hidden": 64}}, "must have shape"),
    "a width in words": ({**GOOD, "config": {**CONFIG, "hidden": "wide"}}, "hidden|config"),
    "no depth": ({**GOOD, "config": {"hidden": 32}}, "config|depth"),
    "depth 0": ({**GOOD, "config": {**CONFIG, "depth": 0}}, "depth must be at least 1"),
    "a size from the future": ({**GOOD, "config": {**CONFIG, "window": 7}}, "config|window"),
    "sizes as a list": ({**GOOD, "config": [1, 2]}, "config"),
    "a refiner's sizes": (
        {**GOOD, "config": {**CONFIG, "reads_velocity": True}},
        "must have shape|role|refiner",
    ),
}


@pytest.mark.parametrize(
    "description, message", OTHER_DESCRIPTIONS.values(), ids=OTHER_DESCRIPTIONS.keys()
)
def test_a_whole_file_with_another_description_is_refused(tmp_path, description, message):
    """As a later version or another program might write: the digest is right, the content is
    not.
    """
    model = sit()
    save_tensors(tmp_path / "good.safetensors", model.state_dict(), DESCRIBED)
    load_sit(tmp_path / "good.safetensors", "predictor")
    path = tmp_path / "a.safetensors"
    save_tensors(path, model.state_dict(), description)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_sit(path, "predictor")
    assert str(path) in str(refusal.value)


KINDS = ["cut short", "header byte", "payload byte", "bit", "bytes appended", "bytes left out"]


def damaged(data: bytes, header: int, kind: str, rng: np.random.Generator) -> bytes:
    """The data with one piece of damage at a random place; header: the length of what precedes the
    tensors.
    """
    out = bytearray(data)
    match kind:
        case "cut short":
            del out[rng.integers(len(out)) :]
        case "header byte" | "payload byte":
            low, high = (0, header) if kind == "header byte" else (header, len(out))
            out[rng.integers(low, high)] ^= int(rng.integers(1, 256))
        case "bit":
            out[rng.integers(len(out))] ^= 1 << int(rng.integers(8))
        case "bytes appended":
            out += rng.bytes(int(rng.integers(1, 100)))
        case "bytes left out":
            at, count = int(rng.integers(len(out))), int(rng.integers(1, 9))
            del out[at : at + count]
    assert bytes(out) != data
    return bytes(out)


def test_six_hundred_damaged_files_of_ours_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_sit(path, sit(), provenance={"settings": {"a": 1}})
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(9)
    for kind in KINDS * 100:
        path.write_bytes(damaged(data, header, kind, rng))
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            load_sit(path, "predictor")
    path.write_bytes(data)
    load_sit(path, "predictor")


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_damaged_torch_files_never_load_other_numbers(tmp_path, suffix):
    """Bytes of a zip that hold nothing (padding, dates) may change and the file still load, with
    the numbers it had.
    """
    path = tmp_path / f"a{suffix}"
    state = sit().state_dict()
    torch.save({"model": state, "args": Namespace(a=1)}, path)
    data = path.read_bytes()
    rng = np.random.default_rng(10)
    loaded = 0
    for kind in KINDS * 50:
        path.write_bytes(damaged(data, len(data) // 20, kind, rng))
        with contextlib.suppress(CheckpointError):
            read = load_sit(path, "predictor", heads=2).model.state_dict()
            loaded += 1
            assert read.keys() == state.keys()
            assert all(torch.equal(read[k], state[k]) for k in state)
    assert (
        loaded < 150
    )  # most damage is refused: appended bytes and header bytes that mean nothing are what remains
