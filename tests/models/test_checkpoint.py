"""Checkpoints: every published form loads."""

from argparse import Namespace

import pytest
import safetensors.torch
import torch
from close import assert_close
from oracle import sit_forward
from published_checkpoints import (
    HEADS,
    agrees,
    inputs,
    predictor_state,
    refiner_state,
    repa_state,
    train_file,
)

import flowturbo as ft
from flowturbo.models.checkpoint import build, convert, load_sit, save_sit
from flowturbo.models.sit import config_from_state
from flowturbo.storage.files import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*label table")


WRAPPED = {
    "bare": lambda m, e: e,
    "under model": lambda m, e: {"model": e},
    "under ema": lambda m, e: {"ema": e},
    "both: ema wins": lambda m, e: {"model": m, "ema": e},
    "ema is nothing": lambda m, e: {"model": e, "ema": None},
    "SiT's train.py": train_file,
    "REPA's trainer": lambda m, e: {**train_file(m, e), "steps": 7},
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".PT"])
@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize(
    "make, role",
    [(predictor_state, "predictor"), (refiner_state, "refiner")],
    ids=["predictor", "refiner"],
)
def test_published_forms_load(tmp_path, wrapper, make, role, suffix):
    other, state = make(11), make(12)
    path = tmp_path / f"a{suffix}"
    torch.save(WRAPPED[wrapper](other, state), path)
    loaded = load_sit(path, role, heads=HEADS)
    assert loaded.convention == "sit"
    assert loaded.model.config == config_from_state(
        state, reads_velocity=role == "refiner", heads=HEADS
    )
    assert agrees(loaded.model, state)
    assert not agrees(loaded.model, other)


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_weights_stand_where_torch_would_put_them(tmp_path, name):
    """In a file they stand anywhere, and products of what lies elsewhere round otherwise."""
    path = tmp_path / name
    state = predictor_state()
    torch.save(state, path) if name.endswith(".pt") else safetensors.torch.save_file(state, path)
    model = ft.load(path, device="cpu", heads=HEADS)
    assert {weight.data_ptr() % 64 for weight in model.predictor.state_dict().values()} == {0}
    assert all(weight.equal(state[key]) for key, weight in model.predictor.state_dict().items())


@pytest.mark.parametrize(
    "make, role",
    [(predictor_state, "predictor"), (refiner_state, "refiner")],
    ids=["predictor", "refiner"],
)
def test_safetensors_of_others_load(tmp_path, make, role):
    state = make(13)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    assert agrees(load_sit(tmp_path / "a.safetensors", role, heads=HEADS).model, state)


def test_files_of_torch_before_1_6_load(tmp_path):
    state = predictor_state(14)
    torch.save({"model": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert agrees(load_sit(tmp_path / "a.pt", "predictor", heads=HEADS).model, state)


def test_positions_are_the_files_own(tmp_path):
    """A checkpoint's pos_embed is used as it is, sines or not."""
    state = predictor_state(15)
    torch.save(state, tmp_path / "a.pt")
    assert torch.equal(
        load_sit(tmp_path / "a.pt", "predictor", heads=HEADS).model.pos_embed, state["pos_embed"]
    )


def test_load_makes_a_flow_model(tmp_path):
    torch.save({"ema": predictor_state(16)}, tmp_path / "p.pt")
    torch.save(refiner_state(17), tmp_path / "r.pth")
    model = ft.load(
        tmp_path / "p.pt", str(tmp_path / "r.pth"), heads=HEADS, device="cpu", dtype=torch.float32
    )
    assert (model.latent_shape, model.num_classes, model.null_class, model.guidance_channels) == (
        (4, 8, 8),
        10,
        10,
        3,
    )
    assert agrees(model.predictor, predictor_state(16))
    assert agrees(model.refiner, refiner_state(17))
    assert ft.load(tmp_path / "p.pt", heads=HEADS, device="cpu").refiner is None
    assert ft.sample(model, "H1P1R1", labels=[3], guidance=1.5, seed=0).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, None], ids=str)
def test_weights_come_in_the_dtype_asked_for(tmp_path, dtype):
    torch.save(predictor_state(18), tmp_path / "p.pt")
    torch.save({k: v.half() for k, v in refiner_state(19).items()}, tmp_path / "r.pt")
    model = ft.load(tmp_path / "p.pt", tmp_path / "r.pt", heads=HEADS, device="cpu", dtype=dtype)
    for network in (model.predictor, model.refiner):
        assert {v.dtype for v in network.state_dict().values()} == {dtype or torch.float32}
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("form", [".pt", ".safetensors", "converted"])
def test_repas_files_run_backwards_in_time(tmp_path, form):
    state = repa_state()
    path = tmp_path / ("a.safetensors" if form == ".safetensors" else "a.pt")
    if form == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(
            {"model": predictor_state(), "ema": state, "args": Namespace(a=1), "steps": 3}, path
        )
    if form == "converted":
        path = tmp_path / "b.safetensors"
        convert(tmp_path / "a.pt", path, heads=HEADS)
    x, t, y = inputs(5)
    theirs = sit_forward(state, HEADS, x, 1 - t, y)
    for convention in ("auto", "repa"):
        model = ft.load(path, heads=HEADS, device="cpu", dtype=torch.float32, convention=convention)
        assert_close(model.predictor(x, t, y), -theirs, 2e-6)
        assert model.guidance_channels == 4
    with pytest.raises(
        CheckpointError, match=r"convention 'sit' was asked for, but the file is of 'repa'"
    ):
        ft.load(path, heads=HEADS, device="cpu", convention="sit")


def test_a_file_without_projectors_may_be_called_repas(tmp_path):
    state = repa_state()
    state = {k: v for k, v in state.items() if not k.startswith("projectors.")}
    torch.save(state, tmp_path / "a.pt")
    x, t, y = inputs(6)
    theirs = sit_forward(state, HEADS, x, 1 - t, y)
    model = ft.load(
        tmp_path / "a.pt", heads=HEADS, device="cpu", dtype=torch.float32, convention="repa"
    )
    assert_close(model.predictor(x, t, y), -theirs, 2e-6)
    assert model.guidance_channels == 4
    plain = ft.load(tmp_path / "a.pt", heads=HEADS, device="cpu", dtype=torch.float32)
    assert_close(plain.predictor(x, 1 - t, y), theirs, 2e-6)
    assert plain.guidance_channels == 3
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", heads=HEADS, convention="repa")
    again = ft.load(tmp_path / "b.safetensors", device="cpu", dtype=torch.float32)
    assert torch.equal(again.predictor(x, t, y), model.predictor(x, t, y))


def test_a_file_of_ours_cannot_be_called_repas(tmp_path):
    save_sit(
        tmp_path / "a.safetensors",
        build(config_from_state(predictor_state(), heads=HEADS), predictor_state()),
    )
    with pytest.raises(
        CheckpointError, match="convention 'repa' was asked for, but the file is of 'sit'"
    ):
        ft.load(tmp_path / "a.safetensors", device="cpu", convention="repa")


def test_reversed_time_samples_what_their_sampler_would(tmp_path):
    """Euler from t = 1 down to 0 in REPA's time, by hand, is Euler from 0 up to 1 in ours."""
    state = repa_state()
    torch.save(state, tmp_path / "a.pt")
    model = ft.load(tmp_path / "a.pt", heads=HEADS, device="cpu", dtype=torch.float64)
    state = {k: v.double() for k, v in state.items()}
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    y = torch.tensor([1, 2])
    got = ft.sample(model, "E4", labels=y, noise=x)
    for k in range(4):
        x = x - 0.25 * sit_forward(
            state, HEADS, x, torch.full((2,), 1 - k / 4, dtype=torch.float64), y
        )
    assert_close(got, x, 1e-6)  # the field rounds to float32 nowhere but in t
