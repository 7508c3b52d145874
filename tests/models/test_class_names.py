"""Names of classes in models' files: kept, checked, and of no effect on files without them."""

import numpy as np
import pytest
import torch
from tiny import CONFIG, random_sit

import flowturbo as ft
from flowturbo.models.checkpoint import convert, load_sit, save_sit
from flowturbo.models.class_names import checked_names, numbered
from flowturbo.storage.files import CheckpointError, load_tensors, save_tensors

NAMES = ("smiley", "smiley-3d", "cat", "hot dog", "n02084071", "ünï", "1st", "-", "a1", "Cat")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


def test_names_pass_through_a_file_bit_for_bit(path):
    model = random_sit(CONFIG, 0)
    save_sit(path, model, class_names=list(NAMES))
    assert load_sit(path, "predictor").class_names == NAMES
    assert ft.load(path, device="cpu").class_names == NAMES
    save_sit(path, model)
    assert load_sit(path, "predictor").class_names is None
    assert ft.load(path, device="cpu").class_names is None


def test_files_without_names_are_what_they_were(path):
    save_sit(path, random_sit(CONFIG, 0), vae="pixels")
    _, description = load_tensors(path)
    assert sorted(description) == ["config", "convention", "format", "provenance", "role", "vae"]


def test_converting_keeps_the_names(tmp_path, path):
    save_sit(path, random_sit(CONFIG, 0), class_names=NAMES)
    convert(path, tmp_path / "half.safetensors", dtype=torch.float16)
    assert load_sit(tmp_path / "half.safetensors", "predictor").class_names == NAMES


BAD = {
    "too few": (NAMES[:9], "class_names must be 10, one for each class, got 9"),
    "too many": ((*NAMES, "more"), "class_names must be 10, one for each class, got 11"),
    "twice": (("cat", *NAMES[1:]), "class_names must be distinct, got 'cat' more than once"),
    "empty": (("", *NAMES[1:]), "that are not empty and have no spaces .*, got '' for class 0"),
    "spaces": ((*NAMES[:9], " "), "have no spaces at their ends, got ' ' for class 9"),
    "two lines": (("a\nb", *NAMES[1:]), r"texts of one line, got 'a\\nb' for class 0"),
    "two lines of Unicode": (("a\u2028b", *NAMES[1:]), r"texts of one line, got 'a\\u2028b'"),
    "surrogate": (("a\udcff", *NAMES[1:]), "texts of one line, got .* for class 0"),
    "a number": ((*NAMES[:9], "7"), "other than numbers, .*, got '7' for class 9"),
    "a signed number": ((*NAMES[:9], "-07"), "other than numbers, .*, got '-07' for class 9"),
    "other digits": ((*NAMES[:9], "７"), "other than numbers, .*, got '７' for class 9"),
    "a whole number": ((*NAMES[:9], 7), "class_names must be texts, got 7 for class 9"),
    "one text": ("abcdefghij", "class_names must be a list of texts, got 'abcdefghij'"),
    "a mapping": ({"cat": 1}, "class_names must be a list of texts, got {'cat': 1}"),
}


@pytest.mark.parametrize("names, message", BAD.values(), ids=BAD)
def test_other_names_are_neither_written_nor_read(path, names, message):
    model = random_sit(CONFIG, 0)
    with pytest.raises((TypeError, ValueError), match=message):
        save_sit(path, model, class_names=names)
    assert not path.exists()
    save_sit(path, model)
    state, description = load_tensors(path)
    save_tensors(path, state, {**description, "class_names": names})
    with pytest.raises(CheckpointError, match=f"m.safetensors: .*{message}"):
        load_sit(path, "predictor")


def test_names_are_dropped_if_other_rows_are_taken_for_classes(path):
    """With row 3 as the null class, the former null class counts as a class without a name."""
    save_sit(path, random_sit(CONFIG, 0), class_names=NAMES)
    assert load_sit(path, "predictor", null_class=None).class_names == NAMES
    assert load_sit(path, "predictor", null_class=10).class_names == NAMES
    other = load_sit(path, "predictor", null_class=3)
    assert (other.model.config.num_classes, other.class_names) == (11, None)


def test_numpys_texts_are_names():
    names = checked_names(list(np.array(["cat", "dog"])), 2)
    assert names == ("cat", "dog")
    assert {type(name) for name in names} == {str}


def test_arrays_of_names_need_names():
    for labels in (np.array(["cat"]), np.array(["cat", 1], dtype=object)):
        with pytest.raises(TypeError, match="the model's classes have no names, got 'cat'"):
            numbered(labels, None)
    numbers = np.array([1, 2], dtype=object)
    assert numbered(numbers, None) is numbers
