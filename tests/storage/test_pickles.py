"""No file runs code."""

import argparse
import contextlib
import functools
import io
import marshal
import operator
import os
import pickle
import runpy
import shutil
import subprocess
import tarfile
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowturbo.storage.files import (
    CheckpointError,
    load_torch_file,
)


class Calls:
    """Unpickles as function(*args)."""

    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


def create(canary: str) -> str:
    return f"open({canary!r}, 'w').close()"


# Name -> (canary, a file that exists) -> an object whose unpickling makes the file `canary`.
PAYLOADS = {
    "os.system": lambda c, _: Calls(os.system, f"touch {c}"),
    "os.mkdir": lambda c, _: Calls(os.mkdir, c),
    "os.open": lambda c, _: Calls(os.open, c, os.O_CREAT),
    "os.symlink": lambda c, f: Calls(os.symlink, f, c),
    "exec": lambda c, _: Calls(exec, create(c)),
    "eval": lambda c, _: Calls(eval, create(c)),
    "open": lambda c, _: Calls(open, c, "w"),
    "io.FileIO": lambda c, _: Calls(io.FileIO, c, "w"),
    "subprocess.call": lambda c, _: Calls(subprocess.call, ["touch", c]),
    "partial": lambda c, _: Calls(functools.partial(subprocess.check_call, ["touch", c])),
    "shutil.copy": lambda c, f: Calls(shutil.copy, f, c),
    "runpy": lambda c, f: (Path(f).write_text(create(c)), Calls(runpy.run_path, f))[1],
    "Path.touch": lambda c, _: Calls(Path.touch, Path(c)),
    "methodcaller": lambda c, _: Calls(operator.methodcaller("touch"), Path(c)),
    "marshal": lambda c, _: Calls(
        exec, Calls(marshal.loads, marshal.dumps(compile(create(c), "x", "exec")))
    ),
    "map": lambda c, _: Calls(list, Calls(map, eval, [create(c)])),
    "reduce": lambda c, _: Calls(functools.reduce, eval, [create(c), {}]),
    "numpy.savetxt": lambda c, _: Calls(np.savetxt, c, [1.0]),
    "torch.save": lambda c, _: Calls(torch.save, 1, c),
    "FileType of argparse": lambda c, _: Calls(argparse.FileType("w"), c),
    "a tensor's rebuilding": lambda c, _: Calls(
        torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {c}",), {}
    ),
    "a Namespace of it": lambda c, _: Calls(Namespace, Calls(os.mkdir, c)),
    "pickle in a pickle": lambda c, _: Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, c))),
}
PLACES = {
    "bare": lambda p: p,
    "a weight": lambda p: {"x_embedder.proj.weight": p},
    "model": lambda p: {"model": {"w": torch.zeros(2), "bad": p}},
    "ema": lambda p: {"model": {"w": torch.zeros(2)}, "ema": p},
    "args": lambda p: {"model": {"w": torch.zeros(2)}, "args": p},
    "in the Namespace": lambda p: {
        "model": {"w": torch.zeros(2)},
        "args": Namespace(lr=1e-4, bad=[p]),
    },
    "opt": lambda p: {
        "model": {"w": torch.zeros(2)},
        "opt": {"state": {0: {"step": p}}, "param_groups": []},
    },
}


def write(content: object, path: Path, form: str) -> None:
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "before 1.6", "pickle"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_file_runs_code(tmp_path, payload, form):
    """At every place of a checkpoint; and the payload is a real one, since plain unpickling runs
    it.
    """
    canary, script, path = tmp_path / "canary", tmp_path / "script.py", tmp_path / "a.pt"
    script.write_text("")
    bad = PAYLOADS[payload](str(canary), str(script))
    for place in PLACES.values():
        write(place(bad), path, form)
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            load_torch_file(path)
        assert not canary.exists()
    with (
        warnings.catch_warnings(),
        contextlib.suppress(TypeError, AttributeError),
    ):  # after the harm
        warnings.simplefilter("ignore")
        pickle.loads(pickle.dumps(bad, protocol=2))
    assert os.path.lexists(canary)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "path_of", ["_os.system", "_sys.modules", "ArgumentParser", "Namespace.__init__", "_os"]
)
def test_an_allowed_module_opens_no_other_door(tmp_path, path_of):
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    content = (
        b"\x80\x04cargparse\n" + path_of.encode() + b"\n(Vtouch " + str(canary).encode() + b"\ntR."
    )
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_torch_file(path)
    assert not canary.exists()
    if path_of == "_os.system":
        pickle.loads(content)
        assert canary.exists()


def test_the_oldest_format_runs_no_code(tmp_path):
    """A tar of pickles, in which torch before 2.6 ran code in spite of weights_only."""
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    content = pickle.dumps(Calls(os.mkdir, str(canary)), protocol=2)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_torch_file(path)
    assert not canary.exists()


def test_a_namespace_is_all_that_is_allowed(tmp_path):
    path = tmp_path / "a.pt"
    content = {
        "model": {"w": torch.ones(2)},
        "args": Namespace(lr=1e-4, inner=Namespace(x=[1, "a", None], t=torch.zeros(1))),
    }
    for form in ("zip", "before 1.6"):
        write(content, path, form)
        loaded = load_torch_file(path)
        assert loaded["args"].lr == 1e-4
        assert loaded["args"].inner.x == [1, "a", None]
        assert torch.equal(loaded["model"]["w"], torch.ones(2))
    for other in (Path("x"), torch.nn.Linear(1, 1), object(), slice(1)):
        write({"args": other}, path, "zip")
        with pytest.raises(CheckpointError):
            load_torch_file(path)
    assert Namespace not in torch.serialization.get_safe_globals()


def test_a_refused_pickle_is_named_and_no_bad_advice_given(tmp_path):
    """torch's own message counsels loading without weights_only."""
    path = tmp_path / "a.pt"
    for bad, name in (
        (Calls(os.system, "true"), "posix.system"),
        (Calls(eval, "1"), r"\beval\b"),
        (Path("x"), "Path"),
    ):
        write({"args": bad}, path, "zip")
        with pytest.raises(CheckpointError, match=name) as refusal:
            load_torch_file(path)
        assert "weights_only" not in str(refusal.value)
        assert str(refusal.value).isprintable()


def test_a_torchscript_archive_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
        with pytest.raises(CheckpointError, match=r"a\.pt") as refusal:
            load_torch_file(path)
    assert "weights_only" not in str(refusal.value)
