"""Plans and a guidance scale in models' files: kept, checked, and written beside the weights."""

import json
import math

import named_model
import pytest
import torch
from named_model import CONFIG_OF_NAMED, GUIDANCE, NAMES, PLANS, contents
from tiny import CONFIG, random_sit

import flowturbo as ft
from flowturbo.models.bundled import MODELS
from flowturbo.models.checkpoint import convert, load_sit, save_sit
from flowturbo.models.headers import named_plans, recommended_guidance
from flowturbo.models.notes import Notes
from flowturbo.storage.files import CheckpointError, load_tensors, save_tensors

STAGED = ft.StagedPlan.parse("A4 at 1/2 + A3 from 0.6")


def bits(path):
    return {name: value.view(torch.uint8) for name, value in load_tensors(path)[0].items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_plans_and_guidance_pass_through_a_file(tmp_path):
    path = named_model.write(tmp_path / "m.safetensors")
    model = ft.load(path, device="cpu")
    assert (model.plans, model.guidance, model.class_names) == (PLANS, GUIDANCE, NAMES)
    for name, plan in model.plans.items():
        assert plan.weights == PLANS[name].weights
        assert plan.guidance_interval == PLANS[name].guidance_interval
    assert load_sit(path, "predictor").notes.plans == contents(tmp_path)


def test_the_plans_of_a_refiner_come_before_the_predictors(tmp_path):
    """They were found with both."""
    path, refiner = named_model.write(tmp_path / "m.safetensors"), tmp_path / "r.safetensors"
    found = {"fast": ft.Plan.parse("E1R1"), "both": ft.Plan.parse("A2R1")}
    network = random_sit(CONFIG_OF_NAMED.refiner(), 1)
    save_sit(refiner, network, plans=contents(tmp_path, found), guidance=3.5, license="MIT")
    model = ft.load(path, refiner, device="cpu")
    assert (model.plans, model.guidance) == ({**PLANS, **found}, 3.5)
    assert (model.class_names, model.license) == (NAMES, None)
    assert named_plans(path, refiner) == model.plans
    assert named_plans(path) == PLANS
    assert (recommended_guidance(path, refiner), recommended_guidance(path)) == (3.5, GUIDANCE)
    save_sit(refiner, network, class_names=NAMES[::-1])
    model = ft.load(path, refiner, device="cpu")
    assert (model.plans, model.guidance, model.class_names) == (PLANS, GUIDANCE, NAMES)


def test_a_plan_may_have_stages(tmp_path):
    path = named_model.write(tmp_path / "m.safetensors", plans=contents(tmp_path, {"two": STAGED}))
    assert ft.load(path, device="cpu").plans == {"two": STAGED}


def test_notes_say_nothing_of_the_training(tmp_path):
    """What a search wrote about a plan are no arguments of a trainer, whatever they are called."""
    held = contents(tmp_path)
    held["fast"]["about"] = {"prediction": "noise", "path_type": "GVP", "num_classes": 3}
    path = named_model.write(tmp_path / "m.safetensors", plans=held)
    assert load_sit(path, "predictor").notes.plans == held


def test_models_without_notes_have_none():
    model = ft.load("digits", device="cpu")
    assert (model.class_names, model.plans) == (None, {})
    assert (model.guidance, model.license) == (None, None)


def test_plans_are_found_without_reading_the_weights(tmp_path):
    """So a misspelled name is told at once."""
    path = named_model.write(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:-7])  # would not load
    assert named_plans(path) == {}
    path = named_model.write(tmp_path / "m.safetensors")
    whole = bytearray(path.read_bytes())
    whole[-7] ^= 1
    path.write_bytes(whole)
    assert named_plans(path) == PLANS
    with pytest.raises(CheckpointError, match="damaged"):
        ft.load(path)


@pytest.mark.parametrize("name", ["digits", "nowhere.safetensors", "nowhere.pt", "org/pipeline"])
def test_where_there_are_no_plans_none_are_found(name):
    assert named_plans(name) == {}
    assert recommended_guidance(name) == 1.5


NO_PLAN = {"format": "flowturbo plan 1", "plan": "A3"}
BAD = {
    "a list": (dict(plans=[1]), r"plans must be a mapping of names to plans, got \[1\]"),
    "letters": (dict(plans={"A4": 1}), "names that are no plans themselves, got 'A4'"),
    "one letter": (dict(plans={"B": 1}), "names that are no plans themselves, got 'B'"),
    "stages": (dict(plans={"fast from": 1}), "names that are no plans themselves"),
    "a file": (dict(plans={"fast.json": 1}), "names that are no plans themselves"),
    "empty": (dict(plans={"": 1}), "plans must have names of one line .*, got ''"),
    "two lines": (dict(plans={"a\nb": 1}), "plans must have names of one line"),
    "an equals sign": (dict(plans={"a=b": 1}), "plans must have names of one line"),
    "text": (dict(plans={"fast": "A4"}), "plans: 'fast' is no plan: its format must be"),
    "half of it": (dict(plans={"fast": NO_PLAN}), "plans: 'fast' is no plan: it must hold"),
    "true": (dict(guidance=True), "guidance must be a number, got True"),
    "a word": (dict(guidance="2"), "guidance must be a number, got '2'"),
    "a number": (dict(license=3), "license must be a text of one line, got 3"),
    "blank": (dict(license=" "), "license must be a text of one line, got ' '"),
    "infinity": (dict(guidance=math.inf), "guidance must be finite, got inf"),
}


@pytest.mark.parametrize("notes, message", BAD.values(), ids=BAD)
def test_other_notes_are_neither_written_nor_read(tmp_path, notes, message):
    path, model = tmp_path / "m.safetensors", random_sit(CONFIG, 0)
    with pytest.raises((TypeError, ValueError), match=message):
        save_sit(path, model, **notes)
    assert not path.exists()
    save_sit(path, model)
    state, description = load_tensors(path)
    save_tensors(path, state, {**description, **notes})
    with pytest.raises(CheckpointError, match=f"m.safetensors: .*{message}"):
        load_sit(path, "predictor")
    assert named_plans(path) == {}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(grid=[0.0, 0.7, 0.3, 1.0]), "grid must rise strictly"),
        (dict(grid=[0.0, 0.3, 1.0]), "grid must hold 4 times"),
        (dict(grid=[0.0, math.nan, 0.7, 1.0]), "grid must rise strictly"),
        (dict(plan="R3"), "R needs the velocity of an earlier step"),
        (dict(plan=3), "plan must be a str, got int"),
        (dict(weights=[[1.0]]), "weights must be given for each"),
        (dict(format="flowturbo plan 2"), "its format must be"),
        (dict(start=0.5), "it must hold"),
    ],
)
def test_a_plan_that_no_file_may_hold_is_refused(tmp_path, change, message):
    held = contents(tmp_path)
    held["default"] |= change
    with pytest.raises(ValueError, match=f"plans: 'default' is no plan: {message}"):
        named_model.write(tmp_path / "m.safetensors", plans=held)


def test_guidance_needs_a_null_class(tmp_path):
    model = random_sit(CONFIG.__class__(**{**vars(CONFIG), "null_row": False}), 0)
    with pytest.raises(ValueError, match="guidance must be 1 for a model without a null class"):
        save_sit(tmp_path / "m.safetensors", model, guidance=2.0)
    save_sit(tmp_path / "m.safetensors", model, guidance=1.0)
    assert ft.load(tmp_path / "m.safetensors", device="cpu").guidance == 1


def test_convert_writes_notes_beside_the_same_weights(tmp_path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_sit(source, random_sit(CONFIG_OF_NAMED, 0), vae="pixels")
    convert(source, target, notes=Notes(NAMES, contents(tmp_path), GUIDANCE))
    assert same(bits(source), bits(target))
    model = ft.load(target, device="cpu")
    assert (model.plans, model.guidance, model.class_names) == (PLANS, GUIDANCE, NAMES)
    more = {"fast": ft.Plan.parse("A4"), "slow": ft.Plan.parse("H8")}
    mit = Notes(plans=contents(tmp_path, more), guidance=1.5, license="MIT")
    convert(target, target, notes=mit)
    assert same(bits(source), bits(target))
    model = ft.load(target, device="cpu")
    assert (model.plans, model.guidance, model.license) == ({**PLANS, **more}, 1.5, "MIT")
    assert model.class_names == NAMES
    with pytest.raises(ValueError, match="class_names must be 6, one for each class, got 2"):
        convert(target, tmp_path / "c.safetensors", notes=Notes(["cat", "dog"]))
    assert not (tmp_path / "c.safetensors").exists()


def test_bundled_files_hold_what_they_say():
    for name, bundled in MODELS.items():
        model = ft.load(name, device="cpu")
        assert named_plans(name) == model.plans
        _, description = load_tensors(bundled.predictor)
        assert json.loads(json.dumps(description.get("plans", {}))).keys() == model.plans.keys()
