"""What trained models say of themselves: no null class without dropped labels, a VAE that fits."""

import pytest
from training_runs import CLASSES, tiny, tiny_refiner

import flowturbo as ft
from flowturbo.training.train import distill, train


def test_a_model_that_dropped_no_labels_has_no_null_class(tmp_path, data):
    path = train(tiny(tmp_path / "p", data, label_drop=0.0, steps=3))
    model = ft.load(path, device="cpu")
    assert (model.num_classes, model.null_class) == (CLASSES, None)
    with pytest.raises(ValueError, match=r"guidance=2\.0 needs a model with a null class"):
        ft.sample(model, "E1", labels=[0], guidance=2, seed=0)
    with pytest.raises(ValueError, match="label_drop must be 0 and guidance 1 1 for a teacher"):
        distill(tiny_refiner(tmp_path / "r", data, path, steps=3))
    guided = dict(label_drop=0.0, guidance=(1.0, 2.0))
    with pytest.raises(ValueError, match="label_drop must be 0 and guidance 1 1 for a teacher"):
        distill(tiny_refiner(tmp_path / "r", data, path, steps=3, **guided))
    refiner = distill(tiny_refiner(tmp_path / "r", data, path, steps=3, label_drop=0.0))
    both = ft.load(path, refiner, device="cpu")
    assert both.refiner.config.null_class is None
    labels = [CLASSES - 1]
    assert ft.sample(both, "H1R1", labels=labels, guidance=1, seed=0).isfinite().all()


def test_no_run_begins_that_would_name_a_vae_of_other_latents(tmp_path, data):
    with pytest.raises(ValueError, match=r"vae .pixels. does not fit .* 1 channels, the model's 2"):
        train(tiny(tmp_path, data, vae="pixels"))
    assert not list(tmp_path.iterdir())


def test_a_refiner_that_dropped_no_labels_is_for_models_without_guidance(tmp_path, data):
    teacher = train(tiny(tmp_path / "p", data, steps=3))
    refiner = distill(tiny_refiner(tmp_path / "r", data, teacher, steps=3, label_drop=0.0))
    with pytest.raises(ValueError, match=r"refiner does not fit .* null_class=None"):
        ft.load(teacher, refiner, device="cpu")
    model = ft.load(teacher, refiner, device="cpu", null_class=None)
    assert model.null_class is None
    assert ft.sample(model, "H1R1", labels=[0], guidance=1, seed=0).isfinite().all()
