"""The classifier of training pictures."""

import pytest
import torch
from class_runs_small import COUNTS, HELD, drawn

from flowturbo.evaluation import picture_classifier as module
from flowturbo.evaluation.picture_classifier import (
    PictureClassifier,
    data_digest,
    kept_classifier,
    train_picture_classifier,
)


@pytest.fixture(scope="module")
def trained():
    return train_picture_classifier(drawn(0, COUNTS), steps=40, batch_size=16)


def test_it_learns_and_reads_pictures_it_never_saw(trained):
    assert trained.accuracy(drawn(1, HELD)) > 0.9
    features, classes = trained.read(3 * drawn(1, HELD).mean)
    assert features.shape == (30, module.FEATURES)
    assert torch.equal(trained.head(features).argmax(1), classes)
    assert torch.equal(features, trained.read((3 * drawn(1, HELD).mean).clamp(-1, 1))[0])


def test_training_depends_on_its_arguments_alone(trained):
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        again = train_picture_classifier(drawn(0, COUNTS), steps=40, batch_size=16)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    other = train_picture_classifier(drawn(0, COUNTS), steps=40, batch_size=16, seed=1)
    assert not torch.equal(trained.head.weight, other.head.weight)


def test_features_do_not_depend_on_the_batch(trained, monkeypatch):
    x = drawn(1, HELD).mean
    whole = trained.read(x)[0]
    monkeypatch.setattr(module, "_ROWS", 7)
    assert torch.allclose(trained.read(x)[0], whole, rtol=1e-5, atol=1e-6)


def test_mirror_images_are_equal_where_the_data_holds_both(trained):
    x = drawn(1, HELD).mean
    features, mirrored = trained.read(x)[0], trained.read(x.flip(3))[0]
    assert torch.equal(features, mirrored)
    own = train_picture_classifier(drawn(0, COUNTS, flipped=False), steps=2, batch_size=8)
    assert not torch.allclose(own.read(x)[0], own.read(x.flip(3))[0])


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 3, 9), (3, 32, 16)])
def test_pictures_of_any_form(shape):
    network = PictureClassifier(shape, 5, True)
    features, classes = network.read(torch.zeros(2, *shape))
    assert features.shape == (2, module.FEATURES)
    assert classes.shape == (2,)


def test_a_stored_classifier_is_not_trained_again(tmp_path, monkeypatch):
    data, path = drawn(0, COUNTS), tmp_path / "new" / "classifier.safetensors"
    first = kept_classifier(path, data, 2)
    monkeypatch.setattr(module, "train_picture_classifier", lambda *_, **__: pytest.fail("again"))
    again = kept_classifier(path, data, 2)
    assert torch.equal(first.read(data.mean)[0], again.read(data.mean)[0])
    with pytest.raises(ValueError, match="steps was 2 and is now 3"):
        kept_classifier(path, data, 3)
    with pytest.raises(ValueError, match="data was"):
        kept_classifier(path, drawn(1, COUNTS), 2)


def test_the_digest_is_of_pictures_and_labels():
    data = drawn(0, COUNTS)
    assert data_digest(data) == data_digest(drawn(0, COUNTS))
    assert data_digest(data) != data_digest(drawn(0, COUNTS, flipped=False))
    data.labels[0] = 1
    assert data_digest(data) != data_digest(drawn(0, COUNTS))
