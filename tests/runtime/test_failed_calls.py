"""A call that failed, wherever and however, leaves nothing behind: the next one is whole."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fake_recorder import Fake
from torch import Tensor

import flowturbo as ft
from flowturbo.runtime.cuda_graphs import CaptureError
from flowturbo_kernels import requested_backend

ERRORS = [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError]
OPTIONS = dict(labels=[1, 2], guidance=1.5, seed=0, output="uint8")


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return ft.sample(ft.load("digits", device="cpu"), "E1", **OPTIONS)


@pytest.fixture
def model() -> ft.FlowModel:
    model = ft.load("digits", device="cpu")
    model.captures.recorder = Fake()
    return model


def raising(error: type[BaseException]) -> Callable[..., None]:
    def run(*args: object, **options: object) -> None:
        raise error("on purpose")

    return run


def whole(model: ft.FlowModel, expected: Tensor) -> None:
    """Calls give what they should, from this thread and from another, and modes are as before."""
    assert requested_backend() == "auto"
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    results = []
    thread = threading.Thread(target=lambda: results.append(ft.sample(model, "E1", **OPTIONS)))
    thread.start()
    thread.join(60)
    results += [ft.sample(model, "E1", **OPTIONS) for _ in range(2)]
    assert len(results) == 3
    assert all(result.equal(expected) for result in results)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["callback", "network", "vae", "on the way"])
def test_an_eager_call(model, expected, monkeypatch, where, error):
    callback = raising(error) if where == "callback" else None
    with monkeypatch.context() as patch:
        if where == "network":
            patch.setattr(model.predictor, "evaluate", raising(error))
        if where == "vae":
            patch.setattr(model.vae, "decode", raising(error))
        if where == "on the way":
            patch.setattr("flowturbo.sampling.run.on_path", raising(error))
        images = np.zeros((2, 8, 8, 3), np.uint8)
        edit = functools.partial(ft.edit, model, "E1", images, [1, 2])
        sample = functools.partial(ft.sample, model, "E1", callback=callback, **OPTIONS)
        run = edit if where == "on the way" else sample
        with pytest.raises(error):
            run()
    whole(model, expected)
    assert model.captures.recorder.recorded == 1


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("what", ["record", "seconds", "turn"])
def test_a_capture(model, expected, monkeypatch, what, error):
    ft.sample(model, "E1", **OPTIONS)
    original, calls = getattr(model.captures.recorder, what), []

    def once(*args: object) -> object:
        calls.append(args)
        if len(calls) == 1:
            raise error("on purpose")
        return original(*args)

    monkeypatch.setattr(model.captures.recorder, what, once)
    if error is KeyboardInterrupt:
        with pytest.raises(error):
            ft.sample(model, "E1", **OPTIONS)
    elif error is torch.OutOfMemoryError:  # it is tried again without other captures
        assert ft.sample(model, "E1", **OPTIONS).equal(expected)
    else:
        with pytest.warns(UserWarning, match="runs without a graph"):
            assert ft.sample(model, "E1", **OPTIONS).equal(expected)
    whole(model, expected)


@pytest.mark.parametrize("error", ERRORS)
def test_a_replay(model, expected, error):
    [capture] = ft.compile(model, "E1", 2, output="uint8")
    replay = capture.replay
    for broken in ("before", "after"):

        def interrupted(broken: str = broken) -> None:
            if broken == "after":
                replay()
            raise error("on purpose")

        capture.replay = interrupted
        # Without memory a run is tried once more, without its capture.
        if error is torch.OutOfMemoryError:
            assert ft.sample(model, "E1", **OPTIONS).equal(expected)
            break
        with pytest.raises(error):
            ft.sample(model, "E1", **OPTIONS)
        capture.replay = replay
    whole(model, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_compile(model, expected, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(model.predictor, "evaluate", raising(error))
        with pytest.raises(CaptureError if error is RuntimeError else error):
            ft.compile(model, "E1", 2, output="uint8")
    assert model.captures.report() == []
    whole(model, expected)
    model.captures.clear()
    [capture] = ft.compile(model, "E1", 2, output="uint8")
    whole(model, expected)
    assert capture.hits == 3


def test_bars_are_closed_after_an_error(model, expected):
    from tqdm import tqdm

    before = len(getattr(tqdm, "_instances", ()))
    for _ in range(5):
        with pytest.raises(RuntimeError):
            ft.sample(model, "E1", callback=raising(RuntimeError), progress=True, **OPTIONS)
    assert len(getattr(tqdm, "_instances", ())) <= before
    whole(model, expected)
