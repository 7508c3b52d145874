"""Checkpoints: every published form loads, everything else is named and refused by one error, and a
written file is bit for bit.
"""

import contextlib
import itertools
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import recipe
import safetensors.torch
import torch
from close import assert_close, relative_error
from oracle import sit_forward
from torch import Tensor

import flowturbo as ft
from flowturbo.models import checkpoint
from flowturbo.models.checkpoint import build, convert, load_sit, save_sit
from flowturbo.models.sit import SiT, SiTConfig, config_from_state
from flowturbo.storage.files import CheckpointError, save_tensors

HEADS = 4
SIZES = dict(hidden=96, heads=HEADS, side=8, classes=10)


def predictor_state(seed: int = 1, depth: int = 2, **sizes: int) -> dict[str, Tensor]:
    """In the published format: learned sigma, a pos_embed of its own."""
    return recipe.state(seed, depth=depth, in_channels=4, **{**SIZES, **sizes})


def refiner_state(seed: int = 2, depth: int = 1, **sizes: int) -> dict[str, Tensor]:
    return recipe.state(seed, depth=depth, in_channels=8, **{**SIZES, **sizes})


def repa_state(seed: int = 3) -> dict[str, Tensor]:
    """As REPA's trainer saves: no learned sigma, and projectors that only its training needs."""
    state = predictor_state(seed)
    state |= {
        f"final_layer.linear.{kind}": state[f"final_layer.linear.{kind}"][:16].clone()
        for kind in ("weight", "bias")
    }
    for layer in (0, 2, 4):
        state |= {
            f"projectors.0.{layer}.weight": torch.randn(8, 8),
            f"projectors.0.{layer}.bias": torch.randn(8),
        }
    return state


def inputs(seed: int, n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, 8, 8, generator=generator)
    return x, torch.rand(n, generator=generator), torch.randint(11, (n,), generator=generator)


def agrees(model: SiT, state: dict[str, Tensor], seed: int = 4) -> bool:
    """Whether the model is the one that this state dict describes."""
    x, t, y = inputs(seed)
    if model.config.reads_velocity:
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
        return (
            relative_error(model(x, t, y, v), sit_forward(state, HEADS, torch.cat([x, v], 1), t, y))
            < 2e-6
        )
    return relative_error(model(x, t, y), sit_forward(state, HEADS, x, t, y)) < 2e-6


def train_file(model: dict[str, Tensor], ema: dict[str, Tensor]) -> dict[str, object]:
    """What SiT's train.py saves."""
    weights = [torch.nn.Parameter(w.clone()) for w in list(model.values())[:3]]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    sum(w.square().sum() for w in weights).backward()
    optimizer.step()
    args = Namespace(
        model="SiT-XL/2",
        image_size=256,
        num_classes=1000,
        ckpt=None,
        path_type="Linear",
        cfg_scale=4.0,
        vae=["ema"],
    )
    return {"model": model, "ema": ema, "opt": optimizer.state_dict(), "args": args}


# Forms that load.

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


# REPA: the same keys, time reversed.


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


# Files that do not fit.


def refused(
    tmp_path: Path, state: object, role: str = "predictor", *, heads: int | None = HEADS
) -> str:
    """The message by which a .pt and, if it can be one, a .safetensors of this state is refused."""
    messages = set()
    torch.save(state, tmp_path / "a.pt")
    paths = [tmp_path / "a.pt"]
    if isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values()) and state:
        paths.append(tmp_path / "a.safetensors")
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, paths[1])
    for path in paths:
        with pytest.raises(CheckpointError) as refusal:
            load_sit(path, role, heads=heads)
        assert str(path) in str(refusal.value)
        messages.add(str(refusal.value).replace(str(path), "FILE"))
    [message] = messages
    return message


@pytest.mark.parametrize("name", predictor_state(depth=1))
def test_a_missing_key_is_named(tmp_path, name):
    state = predictor_state(depth=1)
    del state[name]
    assert name in refused(tmp_path, state)


@pytest.mark.parametrize("name", predictor_state(depth=1))
def test_a_misshapen_key_is_named(tmp_path, name):
    """One row, one column or one axis too many, wherever sizes are not read from."""
    state = predictor_state(depth=1)
    for axis in range(state[name].ndim):
        changed = {
            **state,
            name: torch.cat([state[name], state[name].narrow(axis, 0, 1)], dim=axis),
        }
        if not (
            name == "y_embedder.embedding_table.weight" and axis == 0
        ):  # one class more is a model too
            message = refused(tmp_path, changed)
            assert "must" in message or "shape" in message
            if "x_embedder" not in name:  # sizes are read from it: then others look misshapen
                assert name in message
    assert name.split(".")[0] in refused(tmp_path, {**state, name: state[name][None]})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "name", ["pos_embed", "blocks.0.attn.qkv.weight", "x_embedder.proj.weight"]
)
def test_numbers_of_another_kind_are_named(tmp_path, name, dtype):
    state = predictor_state()
    message = refused(tmp_path, {**state, name: torch.ones_like(state[name]).to(dtype)})
    assert f"{name} must be floating point, got {dtype}" in message


@pytest.mark.parametrize(
    "name",
    [
        "extra",
        "blocks.0.attn.q_norm.weight",
        "blocks.1.mlp.fc3.weight",
        "module.pos_embed",
        "projector.0.weight",
        "decoder.x",
    ],
)
def test_an_extra_key_is_named(tmp_path, name):
    message = refused(tmp_path, {**predictor_state(), name: torch.zeros(2)})
    assert "not part of a SiT" in message
    assert name in message


@pytest.mark.parametrize(
    "name",
    ["blocks.x.attn.qkv.weight", "blocks.", "blocks.-1.mlp.fc1.bias", "blocks.1e3.y", "blocks.²"],
)
def test_a_nonsense_block_is_named(tmp_path, name):
    assert name in refused(tmp_path, {**predictor_state(), name: torch.zeros(2)})


def test_a_gap_in_the_blocks_builds_no_giant(tmp_path, monkeypatch):
    def giant(config: SiTConfig) -> SiT:
        assert config.depth < 100
        return SiT(config)

    monkeypatch.setattr(checkpoint, "SiT", giant)
    message = refused(
        tmp_path, {**predictor_state(), "blocks.1000000.mlp.fc1.bias": torch.zeros(2)}
    )
    assert "blocks." in message


def test_many_problems_are_cut_short(tmp_path):
    state = predictor_state(depth=8)
    message = refused(
        tmp_path,
        {k: v for k, v in state.items() if not k.startswith("blocks.3.")} | {"odd": torch.zeros(1)},
    )
    assert "missing: blocks.3." in message
    assert "and 6 more" in message
    assert "odd" in message
    assert len(message) < 1000


NO_WEIGHTS = {
    "nothing": {},
    "a tensor": torch.zeros(3),
    "a list": [torch.zeros(3)],
    "a number": 3,
    "None": None,
    "weights of something else": {"conv.weight": torch.zeros(3, 3)},
    "a nested dict": {"state_dict": predictor_state(depth=1)},
    "a name that is none": {**predictor_state(depth=1), 3: torch.zeros(1)},
    "a number under a name": {**predictor_state(depth=1), "epoch": 3},
    "an empty ema": {"model": predictor_state(depth=1), "ema": {}},
    "a list under model": {"model": [1, 2]},
    "a tensor without numbers": {
        **predictor_state(depth=1),
        "pos_embed": torch.empty(1, 16, 96, device="meta"),
    },
    "a sparse tensor": {**predictor_state(depth=1), "pos_embed": torch.ones(1, 16, 96).to_sparse()},
}


@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_what_holds_no_weights_is_refused(tmp_path, what):
    torch.save(NO_WEIGHTS[what], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_sit(tmp_path / "a.pt", "predictor", heads=HEADS)


def test_heads_that_cannot_be_known_are_asked_for(tmp_path):
    assert "heads must be given: width 96" in refused(tmp_path, predictor_state(), heads=None)
    assert "heads must divide the hidden size 96, got 7" in refused(
        tmp_path, predictor_state(), heads=7
    )
    assert "heads must be at least 1, got 0" in refused(tmp_path, predictor_state(), heads=0)
    torch.save(predictor_state(), tmp_path / "p.pt")
    with pytest.raises(CheckpointError, match=r"p\.pt: heads must be given"):
        ft.load(tmp_path / "p.pt", device="cpu")


def test_files_of_ours_know_their_heads(tmp_path):
    state = predictor_state()
    save_sit(tmp_path / "a.safetensors", build(config_from_state(state, heads=HEADS), state))
    assert load_sit(tmp_path / "a.safetensors", "predictor").model.config.heads == HEADS
    assert agrees(load_sit(tmp_path / "a.safetensors", "predictor", heads=HEADS).model, state)
    with pytest.raises(CheckpointError, match="heads=2 was asked for, but the file says 4"):
        load_sit(tmp_path / "a.safetensors", "predictor", heads=2)


def velocity_only(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v[:16] if k.startswith("final_layer.linear") else v for k, v in state.items()}


@pytest.mark.parametrize("sigma", [True, False], ids=["learned sigma", "velocity only"])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "published"])
def test_predictor_and_refiner_are_not_exchanged(tmp_path, ours, sigma):
    """A published predictor of 4 channels without sigma has the very shapes of a refiner of 2: it
    is found when both are loaded.
    """
    states = {"predictor": predictor_state(), "refiner": refiner_state()}
    for role, state in states.items():
        state = state if sigma else velocity_only(state)
        path = tmp_path / f"{role}.{'safetensors' if ours else 'pt'}"
        if ours:
            save_sit(
                path,
                build(
                    config_from_state(state, reads_velocity=role == "refiner", heads=HEADS), state
                ),
            )
        else:
            torch.save(state, path)
    predictor, refiner = (tmp_path / f"{role}.{'safetensors' if ours else 'pt'}" for role in states)
    heads = None if ours else HEADS
    with pytest.raises(CheckpointError, match=r"refiner\."):
        ft.load(refiner, heads=heads, device="cpu")
    with pytest.raises(ValueError, match="refiner"):
        ft.load(predictor, predictor, heads=heads, device="cpu")
    with pytest.raises(ValueError, match="refiner"):
        ft.load(refiner, predictor, heads=heads, device="cpu")
    if ours:
        with pytest.raises(CheckpointError, match="is a refiner, but was given as predictor="):
            load_sit(refiner, "predictor")
        with pytest.raises(CheckpointError, match="is a predictor, but was given as refiner="):
            load_sit(predictor, "refiner")


@pytest.mark.parametrize(
    "sizes, what",
    [
        ({"side": 16}, "latent side 16, the predictor 8"),
        ({"classes": 9}, "classes 9, the predictor 10"),
    ],
    ids=["side", "classes"],
)
def test_a_refiner_of_another_size_is_refused(tmp_path, sizes, what):
    torch.save(predictor_state(), tmp_path / "p.pt")
    torch.save(refiner_state(**sizes), tmp_path / "r.pt")
    with pytest.raises(ValueError, match=f"refiner does not fit the predictor: it has .*{what}"):
        ft.load(tmp_path / "p.pt", tmp_path / "r.pt", heads=HEADS, device="cpu")


def test_paths_that_are_no_checkpoints(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"x")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    for name, message in (
        ("a.ckpt", "must end in .safetensors, .pt or .pth"),
        ("a", "neither a bundled model .* nor a"),
        ("gone.pt", "does not exist"),
        ("gone.safetensors", "does not exist"),
        ("folder.pt", "is a folder"),
        ("empty.pt", "is no whole"),
        ("empty.safetensors", "is no whole"),
    ):
        for role in (
            {"predictor": str(tmp_path / name)},
            {"predictor": sit(), "refiner": str(tmp_path / name)},
        ):
            with pytest.raises(CheckpointError, match=message):
                ft.load(**role, device="cpu", heads=HEADS)
    with pytest.raises(
        CheckpointError, match=r"predictor 'digitz' is neither a bundled model .*digits"
    ):
        ft.load("digitz")


def sit(**changes: object) -> SiT:
    sizes = dict(hidden=32, depth=1, heads=2, patch=2, side=8, num_classes=10)
    return SiT(SiTConfig(**{**sizes, **changes})).reset_parameters(torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating point type, got torch.int64"),
        ({"dtype": torch.bool}, TypeError, "dtype"),
        ({"dtype": int}, TypeError, "dtype"),
        ({"dtype": "float32"}, TypeError, "dtype"),
        ({"backend": "fast"}, ValueError, "backend must be .*'fast'"),
        ({"convention": "ddpm"}, ValueError, "convention must be .*'ddpm'"),
        ({"device": "gpu"}, ValueError, "device"),
        (
            {"predictor": None},
            TypeError,
            "predictor must be a path, a bundled name or a SiT, got NoneType",
        ),
        ({"predictor": torch.nn.Linear(1, 1)}, TypeError, "predictor must be .*, got Linear"),
        ({"refiner": 3}, TypeError, "refiner must be .*, got int"),
        ({"refiner": sit()}, ValueError, "refiner must be a SiT with config.reads_velocity=True"),
        (
            {"predictor": sit(reads_velocity=True)},
            ValueError,
            "predictor must be a SiT with config.reads_velocity=False",
        ),
        (
            {"refiner": sit(reads_velocity=True, channels=3)},
            ValueError,
            "latent channels 3, the predictor 4",
        ),
        (
            {"refiner": sit(reads_velocity=True, side=4)},
            ValueError,
            "latent side 4, the predictor 8",
        ),
        (
            {"refiner": sit(reads_velocity=True, num_classes=11)},
            ValueError,
            "classes 11, the predictor 10",
        ),
    ],
    ids=lambda value: (
        "-".join(f"{k} {v}" for k, v in value.items())[:40] if isinstance(value, dict) else ""
    ),
)
@pytest.mark.parametrize("source", ["a module", "a file"])
def test_arguments_that_fit_nothing_are_refused(tmp_path, arguments, kind, message, source):
    predictor: object = sit()
    if source == "a file":
        torch.save(sit().state_dict(), tmp_path / "a.pt")
        predictor = tmp_path / "a.pt"
        arguments = {"heads": 2, **arguments}
    with pytest.raises(kind, match=message):
        ft.load(**{"predictor": predictor, "device": "cpu", **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")], ids=str)
def test_cuda_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=r"device 'cuda.*' was asked for"):
        ft.load(sit(), device=device)


# Files that we write.


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


# Damage.

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
