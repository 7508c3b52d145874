"""What is no checkpoint, or does not fit, is refused by one error that names it."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from published_checkpoints import HEADS, predictor_state, refiner_state, sit
from torch import Tensor

import flowturbo as ft
from flowturbo.models import checkpoint
from flowturbo.models.checkpoint import build, load_sit, save_sit
from flowturbo.models.sit import SiT, SiTConfig, config_from_state
from flowturbo.storage.files import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*label table")


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
    "a nested dict": {"state_dict": {"conv.weight": torch.zeros(3, 3)}},
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


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        (
            {"dtype": torch.int64},
            TypeError,
            "dtype must be a floating point type or 'auto', got torch.int64",
        ),
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
