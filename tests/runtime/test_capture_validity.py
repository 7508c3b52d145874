"""When a capture no longer serves: other weights, devices or networks; what turns captures off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fake_recorder import LABELS, Fake, captured_model, plain
from tiny import CONFIG, random_sit, tiny_model
from torch import Tensor, nn

import flowturbo as ft
from flowturbo.runtime import cuda_graphs
from flowturbo.runtime.cuda_graphs import Captures, Key
from flowturbo.runtime.recorder import CudaRecorder


class Scale(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value), requires_grad=False)


class Baking(Fake):
    """Replays read the weights where they lay when they were recorded."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        then = {m: {k: p.data for k, p in m._parameters.items()} for m in self.root.modules()}
        children = dict(self.root._modules)
        result, replay = super().record(run)

        def replay_there() -> None:
            now, others = (
                {m: {k: p.data for k, p in m._parameters.items()} for m in then},
                dict(self.root._modules),
            )
            self._put(then, children)
            replay()
            self._put(now, others)

        return result, replay_there

    def _put(
        self, data: dict[nn.Module, dict[str, Tensor]], children: dict[str, nn.Module | None]
    ) -> None:
        self.root._modules.update(children)
        for module, parameters in data.items():
            for name, value in parameters.items():
                module._parameters[name].data = value


def moved(root: nn.Sequential) -> None:
    root[0].weight.data = torch.full((2,), 5.0)


def replaced(root: nn.Sequential) -> None:
    root[0] = Scale(5.0)


def another_parameter(root: nn.Sequential) -> None:
    root[0].weight = nn.Parameter(torch.full((2,), 5.0))


def cast(root: nn.Sequential) -> None:
    root.double()
    root[0].weight.data.fill_(5.0)


@pytest.mark.parametrize("change", [moved, replaced, another_parameter, cast])
def test_weights_that_moved_are_captured_anew(change):
    root = nn.Sequential(Scale(3.0))
    captures = Captures(recorder=Baking(root))

    def run() -> list[float]:
        with torch.no_grad():
            return captures.run(
                Key("it", 2), lambda x: (x * root[0].weight).float(), {"x": torch.ones(2)}, [root]
            ).tolist()

    assert [run() for _ in range(3)] == [[3.0, 3.0]] * 3
    change(root)
    assert [run() for _ in range(3)] == [[5.0, 5.0]] * 3
    assert captures.recorder.recorded == 2
    assert len(captures.report()) == 1


def test_weights_changed_in_place_need_no_new_capture():
    model, recorder = captured_model()
    for _ in range(2):
        ft.sample(model, "H1R1", LABELS, seed=0)
    with torch.no_grad():
        model.predictor.blocks[0].mlp.fc1.weight.mul_(2)
    result = ft.sample(model, "H1R1", LABELS, seed=0)
    changed = tiny_model()
    changed.predictor.blocks[0].mlp.fc1.weight.mul_(2)
    assert result.equal(ft.sample(changed, "H1R1", LABELS, seed=0))
    assert recorder.recorded == 1


def test_another_predictor_or_refiner_is_another_run():
    model, recorder = captured_model()
    for _ in range(2):
        ft.sample(model, "H1R1", LABELS, seed=0)
    model.refiner = random_sit(CONFIG.refiner(), 9)
    other = tiny_model()
    other.refiner = model.refiner
    for _ in range(2):
        assert ft.sample(model, "H1R1", LABELS, seed=0).equal(
            ft.sample(other, "H1R1", LABELS, seed=0)
        )
    assert recorder.recorded == 2


def test_a_copy_of_a_model_has_captures_of_its_own():
    model, recorder = captured_model()
    ft.compile(model, "E1")
    for other in (copy.deepcopy(model), replace(model), copy.copy(model.captures)):
        captures = getattr(other, "captures", other)
        assert captures is not model.captures
        assert captures.report() == []
    assert len(model.captures.report()) == 1
    assert recorder.recorded == 1


def test_a_callback_autocast_and_networks_that_are_not_ours_run_as_they_are():
    model, recorder = captured_model()
    for _ in range(3):
        ft.sample(model, "E1", LABELS, seed=0, callback=lambda info: None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ft.sample(model, "E1", LABELS, seed=0)
        other = replace(model, predictor=lambda x, t, y, v=None: x)
        other.captures.recorder = recorder
        ft.sample(other, "E1", LABELS, seed=0)
    assert recorder.recorded == 0


def test_on_the_cpu_there_are_no_graphs():
    model = tiny_model()
    for _ in range(3):
        ft.sample(model, "E1", LABELS, seed=0)
    assert model.captures.report() == []


def test_a_recorder_of_a_gpu_serves_no_cpu():
    captures = Captures(recorder=CudaRecorder(torch.device("cuda", 0)))
    assert not captures.possible(torch.device("cpu"))


def test_a_model_that_went_to_another_device_has_another_recorder(monkeypatch):
    class Placed(Fake):
        def __init__(self, device: torch.device) -> None:
            super().__init__()
            self.device = device

    monkeypatch.setattr(cuda_graphs, "CudaRecorder", Placed)
    captures = Captures()
    for device in ("cpu", "meta"):
        for _ in range(2):
            captures.run(Key(device, 1), lambda x: x + 1, {"x": torch.zeros(1, device=device)}, [])
        assert captures.recorder.device == torch.device(device)
        assert [c.key.what for c in captures.report()] == [device]


@pytest.mark.parametrize("first", [True, False])
def test_a_capture_serves_calls_in_inference_mode_and_outside_it(first):
    model, recorder = captured_model()
    noise = torch.randn(3, *model.latent_shape)
    truth = plain("H1P1R1", LABELS, guidance=2.0, noise=noise)
    for mode in (first, first, not first, first):
        with torch.inference_mode(mode):
            result = ft.sample(model, "H1P1R1", LABELS, guidance=2.0, noise=noise.clone())
        assert result.is_inference() == mode
        assert result.equal(truth)
    assert (recorder.recorded, model.captures.report()[0].hits) == (1, 3)


def test_weights_that_were_made_in_inference_mode_are_captured():
    with torch.inference_mode():
        model, recorder = captured_model()
        [capture] = ft.compile(model, "H1P1R1", 3)
    assert ft.sample(model, "H1P1R1", LABELS, guidance=2.0, seed=0).equal(
        plain("H1P1R1", LABELS, guidance=2.0, seed=0)
    )
    assert (recorder.recorded, capture.hits) == (1, 1)


def test_no_capture_is_part_of_anybodys_gradients():
    captures = Captures(recorder=Fake())
    x = torch.ones(2, requires_grad=True)
    captures.precapture(Key("it", 2), lambda x: x * 2, {"x": x}, [])
    assert captures.run(Key("it", 2), lambda x: x * 2, {"x": x}, []).tolist() == [2.0, 2.0]
    [capture] = captures.report()
    assert not capture.inputs["x"].requires_grad
    assert not capture.result.requires_grad
