"""Training of a refiner, beside its teacher."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_runs import contents, log_of, same_bits, tiny_refiner

import flowturbo as ft
import flowturbo.training.settings as settings_module
from flowturbo.models.checkpoint import load_sit
from flowturbo.models.digests import model_digest
from flowturbo.storage.files import CheckpointError
from flowturbo.training.train import distill


def test_a_refiner_from_end_to_end(tmp_path, data, teacher):
    path = distill(tiny_refiner(tmp_path, data, teacher, steps=150, batch_size=16, save_every=150))
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert np.mean(losses[-30:]) < 0.8 * np.mean(losses[:10])
    model = ft.load(teacher, path, device="cpu")
    config, refiner = model.predictor.config, model.refiner.config
    assert (refiner.depth, refiner.reads_velocity) == (1, True)
    assert (refiner.hidden, refiner.heads, refiner.patch, refiner.side) == (
        config.hidden,
        config.heads,
        config.patch,
        config.side,
    )
    for plan in ("H1P1R1", "H1P5R3", "E1S2"):
        assert ft.sample(model, plan, labels=[0, 2], guidance=2.0, seed=1).isfinite().all()
    fresh = ft.sample(model, "H1P1R1", labels=[0], seed=1)
    model.refiner.final_layer.linear.weight.zero_()
    model.refiner.final_layer.linear.bias.zero_()
    assert not torch.equal(ft.sample(model, "H1P1R1", labels=[0], seed=1), fresh)
    described = load_sit(path, "refiner").provenance
    assert described["steps"] == 150
    # Of paths only the name is kept, with the first digits of the digest.
    assert described["settings"]["teacher"] == f"{teacher.name} ({model_digest(teacher)[:8]})"


def test_a_run_reads_its_teacher_once(tmp_path, data, teacher):
    """Its file may be large, and may move while the run goes on."""
    own = tmp_path / "own.safetensors"
    own.write_bytes(teacher.read_bytes())
    run, seen = tiny_refiner(tmp_path / "run", data, own, steps=3, save_every=1), []

    def digest(path):
        seen.append(path)
        return model_digest(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings_module, "model_digest", digest)
        distill(run)
    assert seen == [str(own)]
    distill(replace(run, steps=4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(inside=True, delta_per_row=True, drop_before=True, delta_max=0.3),
        dict(guidance=(1.0, 3.0)),
        dict(depth=2),
    ],
    ids=str,
)
def test_a_refiner_goes_on_too(tmp_path, data, teacher, options):
    before = teacher.read_bytes()
    distill(tiny_refiner(tmp_path / "one", data, teacher, **options))
    for steps in (3, 12):
        distill(tiny_refiner(tmp_path / "two", data, teacher, steps=steps, **options))
    assert same_bits(contents(tmp_path / "one"), contents(tmp_path / "two"))
    assert teacher.read_bytes() == before
    plain = tmp_path / "plain"
    distill(tiny_refiner(plain, data, teacher))
    assert same_bits(contents(plain), contents(tmp_path / "one")) == (not options)
    if options:
        with pytest.raises(ValueError, match=r" was .* and is now "):
            distill(tiny_refiner(plain, data, teacher, **options))


def test_a_teacher_that_does_not_fit_the_data(tmp_path, data, teacher):
    other = tmp_path / "other.npz"
    np.savez(other, latents=np.zeros((4, 2, 8, 8), np.float32), labels=np.zeros(4, int))
    with pytest.raises(
        ValueError, match=r"data has latents \(2, 8, 8\).* the teacher wants \(2, 4, 4\)"
    ):
        distill(tiny_refiner(tmp_path / "a", str(other), teacher))
    np.savez(other, latents=np.zeros((4, 2, 4, 4), np.float32), labels=np.array([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"4 classes, the teacher wants .* of 3"):
        distill(tiny_refiner(tmp_path / "a", str(other), teacher))
    with pytest.raises(CheckpointError, match="gone"):
        distill(tiny_refiner(tmp_path / "a", data, tmp_path / "gone.pt"))
    refiner = distill(tiny_refiner(tmp_path / "r", data, teacher, steps=1))
    with pytest.raises(CheckpointError, match="is a refiner"):
        distill(tiny_refiner(tmp_path / "a", data, refiner))


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"delta_max": 0.0},
            {"delta_max": 1.0},
            {"delta_max": math.nan},
            {"guidance": (0.5, 2.0)},
            {"guidance": (3.0, 2.0)},
        ),
        *({"guidance": (1.0, math.inf)}, {"batch_size": 0}, {"depth": 0}),
    ],
    ids=str,
)
def test_settings_of_a_refiner_that_make_no_sense_are_refused(tmp_path, change, data, teacher):
    [name] = change
    with pytest.raises(ValueError, match=f"^{name} must be"):
        distill(tiny_refiner(tmp_path, data, teacher, **change))
    assert not list(tmp_path.iterdir())
