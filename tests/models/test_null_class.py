"""The null class of guidance: as the file says, as the user says, and never a class by guess."""

import warnings
from argparse import Namespace

import pytest
import safetensors.torch
import torch
from close import assert_close
from oracle import sit_forward
from published_checkpoints import HEADS, inputs, predictor_state, refiner_state, sit

import flowturbo as ft
from flowturbo.models.checkpoint import convert, load_sit, save_sit
from flowturbo.models.sit import SiT, SiTConfig
from flowturbo.storage.files import CheckpointError

TABLE = "y_embedder.embedding_table.weight"


def with_rows(rows, make=predictor_state, seed=51):
    return make(seed, depth=1, classes=rows - 1)


def written(path, rows, **arguments):
    args = {"args": Namespace(**arguments)} if arguments else {}
    torch.save({"ema": with_rows(rows), **args}, path)
    return path


def loaded(path, heads=HEADS, **options):
    """The model, and whether there was a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = ft.load(path, heads=heads, device="cpu", **options)
    return model, any("label table" in str(warning.message) for warning in caught)


# rows of the table, what the file says -> classes, null class, whether a warning is due
SAID = [
    (11, dict(num_classes=10), 10, 10, False),
    (10, dict(num_classes=10), 10, None, False),
    (11, dict(num_classes=11), 11, None, False),
    (10, dict(num_classes=10, class_dropout_prob=0.0), 10, None, False),
    (10, dict(class_dropout_prob=0), 10, None, False),
    (11, dict(class_dropout_prob=0.1), 10, 10, False),
    (11, dict(num_classes=10, class_dropout_prob=0.1), 10, 10, False),
    (11, dict(num_classes=10, cfg_prob=0.0), 10, None, False),  # REPA: the row is never trained
    (11, dict(num_classes=10, label_drop=0), 10, None, False),
    (1, dict(num_classes=1), 1, None, False),
    (1, {}, 1, None, False),
    (2, dict(num_classes=1), 1, 1, False),
    (11, {}, 10, 10, True),
    (2, {}, 1, 1, True),
    (1000, {}, 999, 999, True),
    (1001, {}, 1000, 1000, False),
    (11, dict(num_classes=1000), 10, 10, True),  # speaks of another table
    (1001, dict(num_classes=500), 1000, 1000, True),
    (11, dict(num_classes=None, class_dropout_prob=None), 10, 10, True),
]


@pytest.mark.parametrize("rows, says, classes, null, warned", SAID, ids=str)
def test_the_file_is_believed(tmp_path, rows, says, classes, null, warned):
    model, warning = loaded(written(tmp_path / "a.pt", rows, **says))
    assert (model.num_classes, model.null_class, warning) == (classes, null, warned)
    used = with_rows(rows)[TABLE][: classes + (null is not None)]
    assert torch.equal(model.predictor.state_dict()[TABLE], used)
    if null is None:
        ft.sample(model, "E1", labels=[classes - 1], guidance=1, seed=0)
        with pytest.raises(
            ValueError, match=r"guidance=4\.0 needs a model with a null class.*give"
        ):
            ft.sample(model, "E1", labels=[0], guidance=4.0, seed=0)
        with pytest.raises(ValueError, match="labels are needed: the model has no null class"):
            ft.sample(model, "E1", noise=torch.zeros(1, 4, 8, 8), guidance=1.0)
    with pytest.raises(ValueError, match=f"labels must be from 0 to {classes - 1}"):
        ft.sample(model, "E1", labels=[classes], seed=0, guidance=1.0)


# rows, what the file says, null_class -> classes, null class
ASKED = [
    (11, {}, 10, 10, 10),
    (11, {}, None, 11, None),
    (11, dict(num_classes=10), None, 10, None),
    (11, dict(num_classes=11), 10, 10, 10),  # the user knows better
    (10, dict(num_classes=10), 9, 9, 9),
    (1001, {}, None, 1000, None),
    (11, {}, 0, 11, 11),
    (11, dict(num_classes=10), 3, 11, 11),
    (1, {}, None, 1, None),
]


@pytest.mark.parametrize("rows, says, asked, classes, null", ASKED, ids=str)
def test_the_user_is_believed_more(tmp_path, rows, says, asked, classes, null):
    path = written(tmp_path / "a.pt", rows, **says)
    model, warning = loaded(path, null_class=asked)
    assert (model.num_classes, model.null_class, warning) == (classes, null, False)
    state = with_rows(rows)
    if asked is not None:  # the unconditional half is that of the row that was asked for
        x, t, _ = inputs(3)
        got = model.predictor(x, t, torch.full((3,), model.null_class))
        assert_close(got, sit_forward(state, HEADS, x, t, torch.full((3,), asked)), 2e-6)
    convert(path, tmp_path / "b.safetensors", heads=HEADS, null_class=asked)
    again, warning = loaded(tmp_path / "b.safetensors")
    assert (again.num_classes, again.null_class, warning) == (classes, null, False)


@pytest.mark.parametrize(
    "null_class, kind, message",
    [
        (11, ValueError, "null_class must be one of the 11 rows.*from 0 to 10, got 11"),
        (-1, ValueError, "null_class must be one of the 11 rows.*got -1"),
        ("last", ValueError, "null_class must be 'auto', None or a row.*got 'last'"),
        (True, TypeError, "null_class must be a whole number, got True"),
        (1.0, TypeError, "null_class must be a whole number, got 1.0"),
    ],
)
def test_rows_that_are_none_are_refused(tmp_path, null_class, kind, message):
    path = written(tmp_path / "a.pt", 11, num_classes=10)
    with pytest.raises(kind, match=message):
        ft.load(path, heads=HEADS, device="cpu", null_class=null_class)


def test_metadata_of_safetensors_are_texts(tmp_path):
    texts = {"num_classes": "10", "class_dropout_prob": "0.0"}
    safetensors.torch.save_file(with_rows(10), tmp_path / "a.safetensors", texts)
    model, warning = loaded(tmp_path / "a.safetensors")
    assert (model.num_classes, model.null_class, warning) == (10, None, False)


def test_files_of_ours_keep_it(tmp_path):
    for null_row in (True, False):
        model = sit(null_row=null_row)
        save_sit(tmp_path / "a.safetensors", model)
        read = load_sit(tmp_path / "a.safetensors", "predictor").model
        assert read.config == model.config
        assert torch.equal(read.state_dict()[TABLE], model.state_dict()[TABLE])
        assert len(read.state_dict()[TABLE]) == 10 + null_row
    # One trained without dropping labels has a null row that no step has changed.
    provenance = {"settings": {"label_drop": 0.0}}
    save_sit(tmp_path / "a.safetensors", sit(), provenance=provenance)
    model, warning = loaded(tmp_path / "a.safetensors", heads=2)
    assert (model.num_classes, model.null_class, warning) == (10, None, False)


def test_networks_say_it_themselves():
    model = ft.load(sit(), device="cpu")
    assert (model.num_classes, model.null_class) == (10, 10)
    assert ft.load(sit(), device="cpu", null_class=10).null_class == 10
    assert ft.load(sit(), device="cpu", null_class=None).null_class is None
    assert ft.load(sit(null_row=False), device="cpu").null_class is None
    with pytest.raises(ValueError, match="null_class must be 10, that of the SiT, or None, got 3"):
        ft.load(sit(), device="cpu", null_class=3)


def test_a_refiner_follows_its_predictor(tmp_path):
    """A refiner's file that says nothing is read as the predictor's; another is compared."""
    args = Namespace(num_classes=10)
    pairs = [(11, True), (10, False)]
    for rows, has_null in pairs:
        torch.save({"ema": with_rows(rows), "args": args}, tmp_path / "p.pt")
        torch.save(with_rows(rows, refiner_state), tmp_path / "r.pt")
        model, warning = loaded(tmp_path / "p.pt", refiner=tmp_path / "r.pt")
        assert (model.num_classes, model.null_class, warning) == (
            10,
            10 if has_null else None,
            False,
        )
        refiner = model.refiner.config
        assert (refiner.num_classes, refiner.null_row) == (10, has_null)
        guidance = 2.0 if has_null else 1.0
        assert ft.sample(model, "H1R1", labels=[9], guidance=guidance, seed=0).isfinite().all()
    torch.save({"ema": with_rows(11), "args": args}, tmp_path / "p.pt")
    torch.save({"ema": with_rows(10, refiner_state), "args": args}, tmp_path / "r.pt")
    with pytest.raises(ValueError, match=r"predictor has a null class.*refiner has none"):
        ft.load(tmp_path / "p.pt", tmp_path / "r.pt", heads=HEADS, device="cpu")
    model, _ = loaded(tmp_path / "p.pt", refiner=tmp_path / "r.pt", null_class=None)
    assert (model.num_classes, model.null_class) == (10, None)


def test_fp8_is_calibrated_on_rows_that_are_there():
    sizes = dict(hidden=64, depth=1, heads=2, patch=2, side=8, num_classes=2, null_row=False)
    network = SiT(SiTConfig(**sizes)).reset_parameters(torch.Generator().manual_seed(1))
    model = ft.load(network, device="cpu", quantize="fp8")
    assert ft.sample(model, "E1", labels=[1], guidance=1.0, seed=0).isfinite().all()


def test_one_class_without_labels(tmp_path):
    """Unconditional models (FFHQ, LSUN): one row, which is class 0."""
    path = written(tmp_path / "a.pt", 1)
    model, warning = loaded(path)
    assert not warning
    state = with_rows(1)
    x, t, _ = inputs(4)
    zeros = torch.zeros(3, dtype=torch.int64)
    assert_close(model.predictor(x, t, zeros), sit_forward(state, HEADS, x, t, zeros), 2e-6)
    with pytest.raises(CheckpointError, match="null_class must be one of the 1 rows"):
        ft.load(path, heads=HEADS, device="cpu", null_class=1)
