"""Digests of models: what results of an evaluation or a search depend on."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
import torch
from named_model import contents
from safetensors.torch import save_file
from tiny import CONFIG, random_sit

import flowturbo as ft
from flowturbo.models.bundled import MODELS
from flowturbo.models.checkpoint import convert, save_sit
from flowturbo.models.digests import model_digest, model_digests
from flowturbo.models.notes import Notes


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_sit(path, random_sit(CONFIG, 5))
    return path


def test_plans_a_scale_and_a_licence_leave_the_digest(file, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    convert(file, one)
    plans = contents(tmp_path, {"fast": ft.Plan.parse("A2")})
    convert(one, two, notes=Notes(plans=plans, guidance=3.0, license="MIT"))
    assert one.read_bytes() != two.read_bytes()
    assert model_digest(one) == model_digest(two)


def test_a_weight_a_name_and_a_vae_change_the_digest(file, tmp_path):
    model = random_sit(CONFIG, 5)
    names = [f"class {k}" for k in range(CONFIG.num_classes)]
    digests = {model_digest(file)}
    for k, described in enumerate([{"vae": "rgb"}, {"class_names": names}, {}]):
        if not described:
            next(iter(model.parameters())).data.view(-1)[-1] += 2**-10
        path = tmp_path / f"{k}.safetensors"
        save_sit(path, model, **described)
        digests.add(model_digest(path))
    assert len(digests) == 4


def test_other_files_count_whole(tmp_path):
    pt, foreign = tmp_path / "a.pt", tmp_path / "b.safetensors"
    torch.save({"a": torch.ones(2, device="cpu", dtype=torch.float32)}, pt)
    save_file({"a": torch.ones(2, device="cpu", dtype=torch.float32)}, foreign, {"by": "others"})
    for path in (pt, foreign):
        assert model_digest(path) == sha256(path.read_bytes()).hexdigest()


def test_of_a_bundled_name_and_its_own_refiner():
    digits = MODELS["digits"]
    assert model_digests("digits", None) == model_digests(digits.predictor, digits.refiner)
    assert model_digests(digits.predictor, None)["refiner_sha256"] is None
