"""Global modes of the caller's: the library does the same under all of them, and leaves them."""

from __future__ import annotations

import ast
import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_recorder import Fake
from paths import ROOT
from training_runs import contents, tiny
from vae_folders import make_folder

import flowturbo as ft
from flowturbo.data.latents import digits
from flowturbo.evaluation.digit_classifier import read_images, train_classifier
from flowturbo.evaluation.velocity import velocity_curve
from flowturbo.models.vae import load_vae
from flowturbo.sampling.generate import generate
from flowturbo.training.train import train


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
        assert torch.get_default_device() == torch.device(name)
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def strict_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def other_random_state() -> Iterator[None]:
    """Neither read nor moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        np.random.seed(5)
        before, numpys = torch.get_rng_state(), np.random.get_state()[1].tolist()
        yield
        assert torch.get_rng_state().equal(before)
        assert np.random.get_state()[1].tolist() == numpys


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield
        assert torch.is_autocast_enabled("cpu")


MODES: dict[str, Callable[[], Any]] = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "another device by default": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "deterministic": deterministic,
    "autocast": autocast,
    "errors of NumPy": lambda: np.errstate(all="raise"),
    "warnings as errors": strict_warnings,
    "another random state": other_random_state,
}

_DIGITS = ft.load("digits", device="cpu")
_IMAGES = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
_MASK = np.arange(64).reshape(8, 8) < 32


def _captured() -> torch.Tensor:
    model = ft.load("digits", device="cpu")
    model.captures.recorder = Fake()
    ft.compile(model, "H1P1", 2)
    return ft.sample(model, "H1P1", [1, 2], guidance=1.5, seed=0)


def _set(tmp_path: Path) -> Any:
    return generate(_DIGITS, "E1", [1, 2, 3], tmp_path / "set", batch_size=2)["images_sha256"]


def _classifier() -> str:
    classifier, test = train_classifier(digits("train"), steps=2), digits("test")
    return json.dumps(
        read_images(classifier, test.mean, test.labels, classifier.read(test.mean)[0])
    )


def _trained(tmp_path: Path) -> Any:
    train(tiny(tmp_path / "run", "digits", steps=2, save_every=2))
    return [v.tolist() for k, v in sorted(contents(tmp_path / "run").items()) if k[-5:] != "steps"]


def _in(dtype: torch.dtype) -> torch.Tensor:
    model = ft.load("digits", device="cpu", dtype=dtype)
    return ft.sample(model, "E1", [1, 2], guidance=1.5, seed=0)


CALLS: dict[str, Callable[..., Any]] = {
    "load": lambda: ft.load("digits", device="cpu").predictor.pos_embed,
    "sample": lambda: ft.sample(_DIGITS, "H1P1R1", [1, 2, 3], guidance=1.5, seed=0),
    "sample images": lambda: ft.sample(
        _DIGITS, "E2", np.array([1, 2, 3]), seed=0, batch_size=2, output="uint8"
    ),
    "sample watched": lambda: ft.sample(_DIGITS, "A2", [1], seed=0, callback=lambda info: None),
    "sample without labels": lambda: ft.sample(
        _DIGITS, "C2", noise=ft.noise((1, 8, 8), 0, range(2))
    ),
    "sample in bfloat16": lambda: _in(torch.bfloat16),
    "a callable": lambda: ft.sample(lambda x, t: t * x, "H1P1", noise=ft.noise((3,), 0, range(2))),
    "edit": lambda: ft.edit(_DIGITS, "H1P1", _IMAGES, [1, 2], seed=0, guidance=2.0),
    "inpaint": lambda: ft.inpaint(_DIGITS, "E2", _IMAGES, _MASK, [1, 2], seed=0),
    "captured": _captured,
    "a set": _set,
    "a curve": lambda: json.dumps(
        velocity_curve(_DIGITS, guidance=1.5, steps=2, images=2, batch_size=2)
    ),
    "a classifier": _classifier,
    "training": _trained,
    "a plan": lambda: repr(ft.Plan.parse("H1P5R3", shift=3.0)),
}


def outcome(call: Callable[..., Any], tmp_path: Path) -> Any:
    result = call(tmp_path) if call.__code__.co_argcount else call()
    if isinstance(result, torch.Tensor):
        return result.dtype, str(result.device), result.tolist()
    return result


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, Any]:
    return {name: outcome(call, tmp_path_factory.mktemp("plain")) for name, call in CALLS.items()}


@pytest.mark.parametrize("mode", MODES)
def test_the_same_under_every_mode(expected, mode, tmp_path):
    # Warnings of a first call, of other libraries, are not this test's.
    different = []
    for number, (name, call) in enumerate(CALLS.items()):
        with MODES[mode]():
            found = outcome(call, tmp_path / str(number))
        if found != expected[name]:
            different.append(name)
    assert not different


@pytest.mark.parametrize("mode", ["float64 by default", "another device by default"])
def test_an_autoencoder_is_read_the_same(mode, tmp_path):
    folder, cpu = make_folder(tmp_path / "vae"), torch.device("cpu")
    latents = ft.noise((4, 4, 4), 0, range(2))
    expected = load_vae(folder, cpu, torch.float32).decode(latents)
    with MODES[mode]():
        vae = load_vae(folder, cpu, torch.float32)
        assert {p.dtype for p in vae.network.parameters()} == {torch.float32}
        assert vae.decode(latents).tolist() == expected.tolist()


_MAKERS = {"zeros", "ones", "full", "empty", "arange", "tensor", "linspace", "rand", "randn",
           "randint", "randperm", "eye", "as_tensor", "Generator"}  # fmt: skip
_INTEGERS = {"arange", "full", "randint", "randperm", "as_tensor", "Generator", "tensor"}
"""Whose dtype follows from their arguments; those of floats are given one all the same."""


def undetermined(source: str) -> list[int]:
    """The lines of calls that make tensors where, or as what, the caller's defaults say."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, of = node.func.attr, node.func.value
        if name not in _MAKERS or not isinstance(of, ast.Name) or of.id != "torch":
            continue
        given = {keyword.arg for keyword in node.keywords}
        placed = "device" in given or (name == "Generator" and node.args)
        typed = name in _INTEGERS or "dtype" in given
        if not (placed and typed):
            lines.append(node.lineno)
    return lines


def test_no_tensor_is_made_by_the_callers_defaults():
    """Exempt are bodies under own_modes() and torch.device."""
    allowed = {"embedders.py", "digit_classifier.py"}
    wrong = {
        f"{path.relative_to(ROOT)}:{lines}"
        for folder in ("flowturbo", "flowturbo_kernels")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in allowed and (lines := undetermined(path.read_text(encoding="utf-8")))
    }
    assert not wrong
    assert undetermined("torch.zeros(2)\ntorch.zeros(2, dtype=d, device=e)\n") == [1]
