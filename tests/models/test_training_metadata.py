"""What a file says of its training is read, and a model of another kind refused."""

import json
from argparse import Namespace

import pytest
import safetensors.torch
import torch
from close import assert_close
from oracle import sit_forward
from published_checkpoints import HEADS, inputs, predictor_state, refiner_state, repa_state, sit

import flowturbo as ft
from flowturbo.cli.main import main
from flowturbo.models.checkpoint import convert, load_sit, save_sit
from flowturbo.models.training_metadata import said_by
from flowturbo.storage.files import CheckpointError, save_tensors

STATE = predictor_state(41, depth=1)


def write(path, arguments, form="args"):
    """The file of a trainer that stores its arguments in this form."""
    content = {"model": STATE, "ema": STATE}
    match form:
        case "args":
            content["args"] = Namespace(**arguments)
        case "mapping":
            content["args"] = dict(arguments)
        case "nested":
            content["config"] = {"data": {"size": 8}, "transport": arguments}
        case "dotted":
            content["cfg"] = {f"transport.{k}": v for k, v in arguments.items()}
        case "dashes":
            content["opts"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        case "Lightning":
            content = {"state_dict": STATE, "hyper_parameters": Namespace(inner=arguments)}
        case "top level":
            content |= arguments
        case "text":
            content["config"] = json.dumps(arguments)
        case "safetensors" | "safetensors' text":
            texts = {k: str(v) for k, v in arguments.items()}
            if form != "safetensors":
                texts = {"format": "pt", "config": json.dumps({"model": arguments})}
            safetensors.torch.save_file(STATE, path.with_suffix(".safetensors"), texts)
            return path.with_suffix(".safetensors")
    torch.save(content, path)
    return path


FORMS = ["args", "mapping", "nested", "dotted", "dashes", "Lightning", "top level", "text"]
FORMS += ["safetensors", "safetensors' text"]
CLASSES = {"num_classes": 10}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"path_type": "GVP", "prediction": "velocity"}, r"path_type is 'GVP'"),
        ({"path_type": "Linear", "prediction": "noise"}, r"prediction is 'noise'"),
    ],
    ids=["path", "prediction"],
)
def test_what_is_no_linear_velocity_is_refused_and_can_be_assumed(tmp_path, form, arguments, named):
    path = write(tmp_path / "a.pt", arguments | CLASSES, form)
    if form == "dashes":
        named = named.replace("_", "-")
    with pytest.raises(CheckpointError, match=named + ".*assume_velocity=True") as refusal:
        ft.load(path, heads=HEADS, device="cpu")
    assert str(path) in str(refusal.value)
    model = ft.load(path, heads=HEADS, device="cpu", assume_velocity=True)
    x, t, y = inputs(1)
    assert_close(model.predictor(x, t, y), sit_forward(STATE, HEADS, x, t, y), 2e-6)


OTHERS = [
    dict(path_type="VP", prediction="score"),
    dict(path_type="cosine", prediction="v"),  # REPA's other path
    dict(path_type="vp"),
    dict(path_type="edm"),
    dict(prediction="score"),
    dict(prediction="x0"),
    dict(prediction_type="epsilon"),
    dict(prediction_type="v_prediction"),  # without a path: that of a diffusion model
    dict(pred_type="sample"),
    dict(interpolant="trig"),
    dict(objective="pred_noise"),
    dict(parameterization="eps"),
    dict(model_mean_type="START_X"),
    dict(path="GVP"),
    dict(sde_type="vp-sde"),
    dict(noise_schedule="linear", diffusion_steps=1000),
    dict(beta_schedule="scaled_linear"),
    dict(predict_xstart=True),
    dict(model="DiT-XL/2", num_classes=10),
]
OURS = [
    dict(path_type="Linear", prediction="velocity"),
    dict(path_type="linear", prediction="v"),
    dict(path_type="ICPlan"),
    dict(path_type="Linear", prediction="v_prediction"),
    dict(path_type=None, prediction=None),
    dict(prediction="flow_prediction"),
    dict(objective="flow matching", target="all", predict="images"),
    dict(predict_xstart=False, noise_schedule="", schedule="cosine", interpolation="bicubic"),
    dict(model="DiT-XL/2", path_type="Linear"),
    dict(model="SiT-XL/2", path="/data", ckpt="DiT-XL-2-256x256.pt"),
    dict(path_type=3, prediction=[1], args=None),
]


@pytest.mark.parametrize("arguments", OTHERS, ids=str)
def test_other_kinds(arguments):
    said = said_by({"args": Namespace(**arguments)})
    assert said.other is not None
    assert said.other.startswith("args.")
    assert any(name in said.other for name in arguments)


@pytest.mark.parametrize("arguments", OURS, ids=str)
def test_what_is_or_may_be_a_linear_velocity(arguments):
    assert said_by({"args": Namespace(**arguments)}).other is None


def test_a_bare_file_by_the_name_of_dits_is_refused(tmp_path):
    """DiT's files have a SiT's very keys and shapes, and predict noise."""
    torch.save(STATE, tmp_path / "DiT-XL-2-256x256.pt")
    with pytest.raises(CheckpointError, match=r"DiT predicts noise.*assume_velocity"):
        load_sit(tmp_path / "DiT-XL-2-256x256.pt", "predictor", heads=HEADS, null_class=10)
    torch.save(STATE, tmp_path / "my-DiT-XL-2.pt")
    load_sit(tmp_path / "my-DiT-XL-2.pt", "predictor", heads=HEADS, null_class=10)


def test_refiners_are_refused_alike(tmp_path):
    args = Namespace(path_type="GVP", num_classes=10)
    torch.save({"ema": refiner_state(42), "args": args}, tmp_path / "r.pt")
    torch.save({"ema": STATE, "args": Namespace(num_classes=10)}, tmp_path / "p.pt")
    files = tmp_path / "p.pt", tmp_path / "r.pt"
    with pytest.raises(CheckpointError, match=r"r\.pt.*path_type"):
        ft.load(*files, heads=HEADS, device="cpu")
    assert ft.load(*files, heads=HEADS, device="cpu", assume_velocity=True).refiner is not None


def test_conversion_keeps_what_was_assumed(tmp_path):
    path = write(tmp_path / "a.pt", dict(path_type="GVP", num_classes=10))
    with pytest.raises(CheckpointError, match="path_type"):
        convert(path, tmp_path / "b.safetensors", heads=HEADS)
    assert not (tmp_path / "b.safetensors").exists()
    convert(path, tmp_path / "b.safetensors", heads=HEADS, assume_velocity=True)
    provenance = load_sit(tmp_path / "b.safetensors", "predictor").provenance
    assert provenance is not None
    assert "GVP" in provenance["assumed"]


@pytest.mark.parametrize("where", ["description", "settings"])
def test_our_own_files_are_read_alike(tmp_path, where):
    """As a later version may write them."""
    save_sit(tmp_path / "a.safetensors", sit(), provenance={"settings": {"lr": 1.0}})
    described = {
        "format": 1,
        "role": "predictor",
        "config": dict(hidden=32, depth=1, heads=2, patch=2, side=8, num_classes=10),
        "convention": "sit",
        "provenance": {"settings": {"prediction": "noise"} if where == "settings" else {}},
    }
    if where == "description":
        described["path_type"] = "GVP"
    load_sit(tmp_path / "a.safetensors", "predictor")
    save_tensors(tmp_path / "b.safetensors", sit().state_dict(), described)
    with pytest.raises(CheckpointError, match="assume_velocity"):
        load_sit(tmp_path / "b.safetensors", "predictor")


REPA_ARGS = dict(
    path_type="linear",
    prediction="v",
    cfg_prob=0.1,
    enc_type="dinov2-vit-b",
    proj_coeff=0.5,
    encoder_depth=8,
    num_classes=10,
)


def test_repas_arguments_tell_of_its_reversed_time(tmp_path):
    """Its projectors do, too, but those are often left out: nothing but training needs them."""
    state = {k: v for k, v in repa_state().items() if not k.startswith("projectors.")}
    torch.save({"ema": state, "args": Namespace(**REPA_ARGS)}, tmp_path / "a.pt")
    x, t, y = inputs(2)
    theirs = sit_forward(state, HEADS, x, 1 - t, y)
    for options in ({}, {"convention": "repa"}):
        model = ft.load(tmp_path / "a.pt", heads=HEADS, device="cpu", **options)
        assert_close(model.predictor(x, t, y), -theirs, 2e-6)
    forwards = ft.load(tmp_path / "a.pt", heads=HEADS, device="cpu", convention="sit")
    assert_close(forwards.predictor(x, 1 - t, y), theirs, 2e-6)
    cosine = Namespace(**REPA_ARGS | {"path_type": "cosine"})
    torch.save({"ema": state, "args": cosine}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="path_type is 'cosine'"):
        ft.load(tmp_path / "a.pt", heads=HEADS, device="cpu")


def test_a_refiner_whose_time_runs_backwards_is_refused(tmp_path):
    save_sit(tmp_path / "r.safetensors", sit(reads_velocity=True), convention="repa")
    with pytest.raises(CheckpointError, match=r"r\.safetensors.* time runs backwards"):
        ft.load(sit(), tmp_path / "r.safetensors", device="cpu")


def test_metadata_of_any_shape_end():
    loop = {"a": {}}
    loop["a"]["b"] = [loop]
    assert said_by(loop).other is None
    deep: dict = {"path_type": "GVP"}
    for _ in range(1000):
        deep = {"a": deep}
    said_by(deep)
    said_by({"config": "{" * 100_000, "cfg": "{" + '"a":{' * 5000})
    said_by({i: dict.fromkeys(range(2000), "x") for i in range(50)})
    said_by({"path_type": "G" * 10**6, "num_classes": "9" * 10**6, "cfg_prob": float("nan")})
    said_by({"num_classes": 10**400, 3: None, ("a", 1): b"x"})


def test_the_command_line_takes_the_same_answers(tmp_path, capsys):
    path = write(tmp_path / "a.pt", dict(path_type="GVP", num_classes=11))
    convert_it = ["convert", str(path), str(tmp_path / "b.safetensors"), "--heads", str(HEADS)]
    assert main(convert_it) != 0
    assert "--assume-velocity" in capsys.readouterr().err
    sample_it = ["sample", "--model", str(path), "--heads", str(HEADS), "--plan", "E1"]
    assert main(sample_it) != 0
    assert "--assume-velocity" in capsys.readouterr().err
    for answer, null in (("auto", None), ("none", None), ("10", 10), ("3", 11)):
        assert main([*convert_it, "--assume-velocity", "--null-class", answer]) == 0
        read = load_sit(tmp_path / "b.safetensors", "predictor").model
        assert read.config.null_class == null
    save_sit(tmp_path / "grey.safetensors", sit(channels=1, null_row=False), vae="pixels")
    out = tmp_path / "grey.npz"
    sample_it = ["sample", "--model", str(out.with_suffix(".safetensors")), "--out", str(out)]
    assert main(sample_it) != 0
    assert "guidance=1.5 needs a model with a null class" in capsys.readouterr().err
    assert main([*sample_it, "--plan", "E1", "--guidance", "1"]) == 0
    assert main([*sample_it, "--null-class", "9", "--assume-velocity", "--plan", "E1"]) == 0
