"""Files are whole or absent, and damage is found to the last bit."""

import hashlib
import json
import os
import pickle
import re
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from paths import ROOT

from flowturbo.storage.files import (
    CheckpointError,
    atomic_write,
    load_tensors,
    load_torch_file,
    save_tensors,
    write_text,
)


def test_a_written_file_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    write_text(path, "zwei: ü")
    assert path.read_text(encoding="utf-8") == "zwei: ü"
    assert os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_crash_leaves_what_was_there(tmp_path, error, before):
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)

    def crash():
        with atomic_write(path) as file:
            file.write(b"new" * 10_000)
            raise error

    with pytest.raises(error):
        crash()
    assert os.listdir(tmp_path) == ([] if before is None else ["a.bin"])
    assert before is None or path.read_bytes() == before


def test_a_failed_rename_leaves_no_temporary_file(tmp_path):
    target = tmp_path / "a.bin"
    target.mkdir()
    with pytest.raises(OSError, match=r"a\.bin"), atomic_write(target) as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_kill_inside_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = f"""
import os, signal
from flowturbo.storage.files import atomic_write
with atomic_write({str(path)!r}) as file:
    file.write(b"new" * 100_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_a_reader_keeps_the_file_that_it_opened(tmp_path):
    path = tmp_path / "a.bin"
    write_text(path, "old")
    with open(path) as reader:
        write_text(path, "newer")
        assert reader.read() == "old"
    assert path.read_text() == "newer"


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a", "a")
        save_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(1)}, {})
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    for name in ("a", "b.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("a.txt", "a")
    save_tensors("b.safetensors", {"x": torch.ones(2)}, {})
    assert torch.equal(load_tensors("b.safetensors")[0]["x"], torch.ones(2))
    assert sorted(os.listdir()) == ["a.txt", "b.safetensors"]


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def numbers(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of every dtype and of awkward shapes and layouts."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {str(d): (torch.randn(3, 5, generator=generator) * 9).to(d) for d in DTYPES}
    tensors["scalar"] = torch.randn((), generator=generator)
    tensors["empty"] = torch.empty(0, 4)
    tensors["turned"] = torch.randn(3, 4, generator=generator).T
    tensors["strided"] = torch.randn(8, generator=generator)[::2]
    tensors["expanded"] = torch.randn(1, 4, generator=generator).expand(3, 4)
    tensors["not finite"] = torch.tensor(
        [math_nan := float("nan"), float("inf"), -float("inf"), -0.0, math_nan]
    )
    tensors["learnt"] = torch.nn.Parameter(torch.randn(2, generator=generator))
    return tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*raw)


DESCRIPTIONS = [
    {},
    {"kind": "x", "nested": {"a": [1, 2.5, None, True], "ü": '→ \n " \\'}},
    {
        "sha256": "0" * 64,
        "text": f'"sha256":"{"0" * 64}"',
        "flowturbo": '{"sha256":"' + "f" * 64 + '"}',
    },
]


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=["empty", "nested", "digests in it"])
def test_a_round_trip_is_exact(tmp_path, description):
    path, tensors = tmp_path / "a.safetensors", numbers(1)
    save_tensors(path, tensors, description)
    loaded, described = load_tensors(path)
    assert described == description
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[k], tensors[k]) for k in tensors)
    assert safetensors.torch.load_file(path).keys() == tensors.keys()  # anyone else can read it too


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=["empty", "nested", "digests in it"])
def test_the_digest_is_over_every_byte_but_its_own(tmp_path, description):
    path = tmp_path / "a.safetensors"
    save_tensors(path, numbers(2), description)
    data = path.read_bytes()
    digests = re.findall(rb'"sha256":"([0-9a-f]{64})"', data)
    assert len(digests) == 1
    assert hashlib.sha256(data.replace(digests[0], b"0" * 64)).hexdigest() == digests[0].decode()


def test_files_of_others_load_without_a_digest(tmp_path):
    tensors = {k: v.detach().contiguous() for k, v in numbers(3).items()}
    for name, metadata in (
        ("plain", None),
        ("pt", {"format": "pt"}),
        ("other", {"format": "pt", "modelspec.title": "x"}),
    ):
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file(tensors, path, metadata)
        loaded, described = load_tensors(path)
        assert described is None
        assert all(same_bits(loaded[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize(
    "metadata",
    [
        {"sha256": "0" * 64},
        {"sha256": ""},
        {"flowturbo": "{}"},
        {"flowturbo": "{}", "sha256": "0" * 64},
        {"flowturbo": "{}", "sha256": "a" * 63},
    ],
)
def test_half_of_our_marks_is_damage(tmp_path, metadata):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(3)}, path, metadata)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_tensors(path)


def test_every_byte_of_the_header_counts(tmp_path):
    """Every byte of length and header, with one bit of it turned."""
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.zeros(2), "y": torch.ones(3)}, {"kind": "x", "n": 1})
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for at in range(end):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            load_tensors(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("read", [load_tensors, load_torch_file])
def test_what_is_no_file_of_tensors(tmp_path, read):
    contents = {
        "empty": b"",
        "one byte": b"\x80",
        "text": b"this is not it\n" * 50,
        "json": json.dumps({"a": 1}).encode(),
        "noise": np.random.default_rng(4).bytes(5000),
        "huge header": (2**62).to_bytes(8, "little") + b"{}",
        "zip": b"PK\x03\x04" + bytes(200),
        "pickle": pickle.dumps({"a": [1, 2]}, protocol=4)[:-1],
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.x"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as refusal:
            read(path)
        assert str(path) in str(refusal.value), name
    with pytest.raises(CheckpointError, match=r"gone\.x does not exist"):
        read(tmp_path / "gone.x")
    with pytest.raises(CheckpointError, match="is a folder, not a file"):
        read(tmp_path)
