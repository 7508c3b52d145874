"""Checkpoints with changed bytes: a SiT or a CheckpointError; no crash, no pickle, no giant."""

import json
import pickle
from argparse import Namespace
from io import BytesIO

import pytest
import safetensors.torch
import torch
from fuzzing import CHANGES, JSON, LONG, SHORT, changed, refusal, rezipped, watched
from hypothesis import example, given
from hypothesis import strategies as st
from published_checkpoints import sit

from flowturbo.models.checkpoint import load_sit, save_sit
from flowturbo.models.sit import SiT
from flowturbo.storage.files import CheckpointError, save_tensors

STATE = sit(hidden=16, side=4, num_classes=2).state_dict()
CONTENT = {
    "model": {"module." + name: value for name, value in STATE.items()},
    "ema": STATE,
    "args": Namespace(path_type="Linear", num_classes=2, lr=1e-4, ckpt=None),
    "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0, 1]}]},
}
DESCRIPTION = {
    "format": 1,
    "role": "predictor",
    "config": dict(hidden=16, depth=1, heads=2, patch=2, side=4, num_classes=2),
    "convention": "sit",
    "vae": None,
    "provenance": {"settings": {"lr": 1.0}},
}


def torch_bytes(**options) -> bytes:
    file = BytesIO()
    torch.save(CONTENT, file, **options)
    return file.getvalue()


def our_bytes(path) -> bytes:
    save_sit(path, sit(hidden=16, side=4, num_classes=2))
    return path.read_bytes()


def loads(path, data: bytes, heads: int | None = 2) -> SiT | None:
    """The SiT of a file with these bytes, or None if it is refused as documented."""
    path.write_bytes(data)
    models: list[SiT] = []
    message = refusal(
        CheckpointError, lambda: models.append(load_sit(path, "predictor", heads=heads).model)
    )
    if message is not None:
        assert str(path) in message
        assert len(message) < 3000
        return None
    [model] = models
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert sum(value.numel() for value in model.state_dict().values()) < 10 * len(data)
    return model


def zip_bytes(tmp, changes):
    loads(tmp / "a.pt", changed(torch_bytes(), changes))


def pickle_in_zip(tmp, changes):
    loads(tmp / "a.pt", rezipped(torch_bytes(), "data.pkl", changes))


def legacy(tmp, changes):
    loads(tmp / "a.pt", changed(torch_bytes(_use_new_zipfile_serialization=False), changes))


def foreign_safetensors(tmp, changes):
    data = safetensors.torch.save(STATE, {"num_classes": "2", "config": '{"path_type": "Linear"}'})
    loads(tmp / "a.safetensors", changed(data, changes))


def header_of_safetensors(tmp, changes):
    """With the length of the header right, so that it is read."""
    data = safetensors.torch.save(STATE, {"num_classes": "2", "config": '{"path_type": "Linear"}'})
    end = 8 + int.from_bytes(data[:8], "little")
    header = changed(data[8:end], changes)
    loads(tmp / "a.safetensors", len(header).to_bytes(8, "little") + header + data[end:])


def ours(tmp, changes):
    data = our_bytes(tmp / "a.safetensors")
    other = changed(data, changes)
    assert loads(tmp / "a.safetensors", other, None) is None or other == data


READERS = [zip_bytes, pickle_in_zip, legacy, foreign_safetensors, header_of_safetensors, ours]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS)
def test_changed_bytes(tmp_path, reader):
    @SHORT
    @given(CHANGES)
    def run(changes):
        reader(tmp_path, changes)

    reader(tmp_path, [])
    run()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS)
def test_changed_bytes_at_length(tmp_path, reader):
    @LONG
    @given(CHANGES)
    def run(changes):
        reader(tmp_path, changes)

    run()


def described(tmp, place, value):
    """A file of ours with another description, whose digest is right."""
    description = json.loads(json.dumps(DESCRIPTION))
    inner = description
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    try:
        save_tensors(tmp / "b.safetensors", STATE, description)
    except ValueError:  # JSON has no such text
        return
    loads(tmp / "a.safetensors", (tmp / "b.safetensors").read_bytes(), None)


PLACES = st.sampled_from(
    [(name,) for name in DESCRIPTION]
    + [("config", name) for name in (*DESCRIPTION["config"], "null_row", "channels", "new")]
    + [("provenance", "settings"), ("provenance", "settings", "label_drop")]
)
VALUES = JSON | st.sampled_from([10**9, 10**30, 2**63, 1e308, "1" * 300, [[[]]], {"a": {}}])


def run_descriptions(tmp_path, kind):
    @kind
    @given(PLACES, VALUES)
    @example(("config", "depth"), 10**9)
    @example(("config", "side"), 2**24)
    @example(("config", "hidden"), 10**30)
    @example(("config", "null_row"), None)
    @example(("config",), [])
    @example(("vae",), 3)
    @example(("provenance",), [1])
    @example(("convention",), {})
    def run(place, value):
        described(tmp_path, place, value)

    run()


def test_other_descriptions(tmp_path):
    run_descriptions(tmp_path, SHORT)


@pytest.mark.slow
def test_other_descriptions_at_length(tmp_path):
    run_descriptions(tmp_path, LONG)


def test_a_description_that_is_no_mapping(tmp_path):
    import flowturbo.storage.files as files

    for value in ([], "x", 3, None, [["format", 1]]):
        blank = {"flowturbo": json.dumps(value), "sha256": "0" * 64}
        data = files._ordered(safetensors.torch.save(STATE, blank))
        start = data.index(b'"sha256":"') + len('"sha256":"')
        data[start : start + 64] = files.hashlib.sha256(data).hexdigest().encode()
        assert loads(tmp_path / "a.safetensors", bytes(data), None) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("length", [2**31 - 1, 2**32 - 1])
def test_a_text_that_lies_about_its_length_costs_no_memory(tmp_path, length):
    """In a pickle of the format before 1.6, which torch reads from the file itself."""
    data = torch_bytes(_use_new_zipfile_serialization=False)
    at = data.index(b"X\x05\x00\x00\x00model") + 1
    lying = data[:at] + length.to_bytes(4, "little") + data[at + 4 :]
    path = tmp_path / "a.pt"
    assert loads(path, data) is not None
    path.write_bytes(lying)
    with watched(1 << 28), pytest.raises(CheckpointError, match=r"a\.pt is no whole torch file"):
        load_sit(path, "predictor", heads=2)


def test_the_watch_sees_what_it_must(tmp_path):
    """An unpickled class, and a huge allocation."""
    with pytest.raises(AssertionError, match=r"pickle\.find_class"), watched():
        pickle.loads(pickle.dumps(Namespace(a=1)))
    with pytest.raises((MemoryError, RuntimeError)), watched():
        bytearray(1 << 34)


@pytest.mark.parametrize("name", ["data/0", "data.pkl"])
def test_compressed_parts_are_refused(tmp_path, name):
    """A few kilobytes of zip may be gigabytes of zeros."""
    import zipfile

    path = tmp_path / "a.pt"
    torch.save({"x": torch.zeros(1 << 16)}, tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "b.pt") as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            packed = zipfile.ZIP_DEFLATED if info.filename.endswith(name) else zipfile.ZIP_STORED
            new.writestr(info.filename, old.read(info), packed)
    with pytest.raises(CheckpointError, match=f"its part '.*{name}' is compressed"):
        load_sit(path, "predictor")
