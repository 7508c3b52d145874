"""Captures of whole runs, with a recorder that needs no GPU: keys, buffers, bounds, threads, and
what goes wrong.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from fake_recorder import LABELS, Fake, captured_model
from tiny import CONFIG, random_sit, tiny_model
from torch import Tensor, nn

import flowturbo as ft
from flowturbo.integrations.transformer import Graphed
from flowturbo.models.vae import Pixels
from flowturbo.runtime import cuda_graphs as graph
from flowturbo.runtime.cuda_graphs import Captures, Key
from flowturbo.runtime.recorder import CudaRecorder


def plain(*args: object, **options: object) -> Tensor:
    return ft.sample(tiny_model(), *args, **options)


def test_the_first_run_is_eager_the_second_is_captured_and_then_it_is_replayed():
    model, recorder = captured_model()
    seen = []
    for seed in range(4):
        result = ft.sample(model, "H1P1R1", LABELS, guidance=2.0, seed=seed)
        assert result.equal(plain("H1P1R1", LABELS, guidance=2.0, seed=seed))
        seen.append((recorder.recorded, recorder.replayed))
    assert seen == [(0, 0), (1, 3), (1, 4), (1, 5)]  # two replays are timed
    [capture] = model.captures.report()
    assert (capture.hits, capture.memory, capture.eager_seconds, capture.replay_seconds) == (
        3,
        1 << 20,
        0.25,
        0.25,
    )


def test_no_label_seed_noise_or_scale_makes_a_new_capture():
    model, recorder = captured_model()
    for labels, seed, guidance in (
        (LABELS, 0, 2.0),
        ([4, 4, 4], 1, 1.5),
        (LABELS, 2, 0.0),
        ([0, 9, 5], 3, -1.0),
    ):
        result = ft.sample(model, "H1R1", labels, guidance=guidance, seed=seed)
        assert result.equal(plain("H1R1", labels, guidance=guidance, seed=seed))
    noise = torch.randn(3, *model.latent_shape)
    assert ft.sample(model, "H1R1", LABELS, guidance=3.0, noise=noise).equal(
        plain("H1R1", LABELS, guidance=3.0, noise=noise)
    )
    assert recorder.recorded == 1


def test_everything_that_changes_the_work_makes_a_new_capture():
    model, recorder = captured_model(limit=100)
    model.vae = Pixels()
    model.vae.decode = lambda latents: latents.mul(20).to(torch.uint8).permute(0, 2, 3, 1)
    base = dict(plan="H1R1", labels=LABELS, guidance=2.0, seed=0)
    changes = [
        {},
        dict(plan="H1P1"),
        dict(plan=ft.Plan.parse("H1R1", shift=2.0)),
        dict(plan=ft.Plan.parse("H1R1", guidance_interval=(0.0, 0.5))),
        dict(guidance=1.0),
        dict(guidance_channels=2),
        dict(labels=[1]),
        dict(batch_size=2),
        dict(output="uint8"),
        dict(seed=None, noise=torch.zeros(3, *model.latent_shape, dtype=torch.float64)),
    ]
    for number, change in enumerate(changes, 1):
        for _ in range(3):
            ft.sample(model, **{**base, **change})
        assert recorder.recorded == number, change
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWTURBO_BACKEND", "reference")
        for _ in range(3):
            ft.sample(model, **base)
    assert recorder.recorded == len(changes) + 1
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            ft.sample(model, **base)
    finally:
        torch.use_deterministic_algorithms(False)
    assert recorder.recorded == len(changes) + 2


def test_settings_of_arithmetic_make_a_new_capture_of_a_network_too():
    class Doubling(nn.Module):
        def forward(self, x: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (2 * x,)

    network, captures = Doubling(), Captures(recorder=Fake())
    Graphed(network, captures)
    with torch.no_grad():
        for on in (False, True):
            torch.use_deterministic_algorithms(on)
            try:
                for _ in range(3):
                    assert network(torch.ones(2), return_dict=False)[0].tolist() == [2.0, 2.0]
            finally:
                torch.use_deterministic_algorithms(False)
    assert captures.recorder.recorded == 2


def test_results_of_earlier_replays_stay_whole():
    model, _ = captured_model()
    results = [
        ft.sample(model, plan, LABELS, seed=seed) for seed in range(5) for plan in ("H1R1", "E2")
    ]
    truth = [plain(plan, LABELS, seed=seed) for seed in range(5) for plan in ("H1R1", "E2")]
    assert all(a.equal(b) for a, b in zip(results, truth, strict=True))


def test_batches_of_one_job_are_replayed():
    model, recorder = captured_model()
    result = ft.sample(model, "H1R1", list(range(10)), seed=0, batch_size=3)
    assert result.equal(plain("H1R1", list(range(10)), seed=0, batch_size=3))
    assert (recorder.recorded, model.captures.report()[0].hits) == (1, 3)


def test_decoding_is_in_the_capture():
    model, recorder = captured_model(config=replace(CONFIG, channels=1))
    model.vae = Pixels()
    for seed in range(3):
        images = ft.sample(model, "H1R1", LABELS, seed=seed, output="uint8")
        latents = ft.sample(tiny_model(replace(CONFIG, channels=1)), "H1R1", LABELS, seed=seed)
        assert images.equal(Pixels().decode(latents))
    assert recorder.recorded == 1
    assert model.captures.report()[0].result.dtype == torch.uint8


def test_the_bar_runs_on_with_captures(capsys):
    model, _ = captured_model()
    for _ in range(3):
        ft.sample(model, "E3", list(range(6)), seed=0, batch_size=2, progress=True)
    assert "/9 " in capsys.readouterr().err


# Bounds


def test_the_least_recently_used_capture_goes_first_and_those_made_ahead_last():
    model, recorder = captured_model(limit=3)
    ft.compile(model, "E1", 3, guided=False)
    for plan in ("E2", "E2", "E3", "E3", "E2", "E4", "E4"):
        ft.sample(model, plan, LABELS, seed=0)
    assert [str(c.key.what.plan) for c in model.captures.report()] == ["E1", "E2", "E4"]
    recorded = recorder.recorded
    ft.sample(model, "E3", LABELS, seed=0)  # met before: captured at once
    assert recorder.recorded == recorded + 1
    assert [str(c.key.what.plan) for c in model.captures.report()] == ["E1", "E4", "E3"]


def test_a_limit_of_zero_captures_nothing():
    model, recorder = captured_model(limit=0)
    for _ in range(3):
        ft.sample(model, "E1", LABELS, seed=0)
    assert recorder.recorded == 0


def test_what_was_met_is_forgotten_in_the_end():
    captures, recorder = Captures(limit=1, recorder=Fake()), nn.Identity()
    for n in range(1000):
        captures.run(Key(n, 1), lambda x: x, {"x": torch.zeros(1)}, [recorder])
    assert len(captures._met) < 100


def test_clearing_gives_memory_back():
    model, recorder = captured_model()
    ft.compile(model, "E1")
    released = recorder.released
    model.captures.clear()
    assert model.captures.report() == []
    assert recorder.released > released


def test_a_capture_that_was_given_up_holds_no_memory_whoever_holds_it():
    model, recorder = captured_model()
    [made] = ft.compile(model, "E1")
    buffers = [weakref.ref(tensor) for tensor in made.inputs.values()]
    whole = []
    recorder.settle = lambda: whole.append(
        all(buffer() is not None for buffer in buffers)
    )  # the device may still be using them
    model.captures.clear()
    recorder.buffers.clear()
    assert whole == [True]
    assert [buffer() for buffer in buffers] == [None] * len(buffers)
    assert (made.inputs, made.result.numel(), made.watched.kept, made.memory) == (
        {},
        0,
        [],
        1 << 20,
    )
    with pytest.raises(RuntimeError, match="was given up"):
        made.replay()


# Ahead of time


def test_compile_captures_every_plan_with_every_batch_size():
    model, recorder = captured_model()
    made = ft.compile(model, ["H1R1", ft.Plan.parse("E2")], [1, 4])
    assert [(str(c.key.what.plan), c.key.size) for c in made] == [
        ("H1R1", 1),
        ("H1R1", 4),
        ("E2", 1),
        ("E2", 4),
    ]
    assert recorder.recorded == 4
    assert [c.precaptured for c in model.captures.report()] == [True] * 4
    assert ft.compile(model, "E2", 4) == made[3:]
    assert recorder.recorded == 4
    assert ft.sample(model, "E2", LABELS, guidance=2.0, seed=1).equal(
        plain("E2", LABELS, guidance=2.0, seed=1, batch_size=4)
    )
    assert (recorder.recorded, made[3].hits) == (4, 1)


def test_a_run_that_compiles_is_not_the_one_that_is_timed():
    captures, calls, timed = Captures(recorder=Fake()), [], []
    seconds = captures.recorder.seconds
    captures.recorder.seconds = lambda run: timed.append(len(calls)) or seconds(run)
    captures.precapture(Key("it", 1), lambda x: calls.append(1) or x + 1, {"x": torch.zeros(1)}, [])
    assert timed[0] == 1


def test_without_a_batch_size_the_smallest_capture_that_holds_all_is_taken():
    model, recorder = captured_model()
    two, four = ft.compile(model, "E1", [2, 4], guided=False)
    for count, hits in ((1, (1, 0)), (2, (2, 0)), (3, (2, 1)), (4, (2, 2)), (5, (2, 2))):
        result = ft.sample(model, "E1", list(range(count)), seed=0)
        assert len(result) == count
        assert result.equal(
            plain("E1", list(range(count)), seed=0, batch_size={1: 2, 3: 4}.get(count))
        )
        assert (two.hits, four.hits) == hits
    ft.sample(model, "E1", [1], seed=0, batch_size=1)
    assert (two.hits, four.hits) == (2, 2)
    ft.sample(model, "E1", [1], seed=0, guidance=2.0)  # guided runs are others
    assert (two.hits, four.hits) == (2, 2)
    assert recorder.recorded == 2


def test_compile_without_graphs_runs_once_and_says_so():
    model = tiny_model()
    calls = []
    original = model.predictor.evaluate
    model.predictor.evaluate = lambda *args: calls.append(1) or original(*args)
    assert ft.compile(model, "H1", [1, 2]) == []
    assert len(calls) == 4
    assert ft.summary(model) == "nothing is captured"


def test_compile_shows_a_bar_when_asked(capsys):
    ft.compile(tiny_model(), ["E1", "E2"], [1, 2], progress=True)
    assert "/4 " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, kind, said",
    [
        (dict(plans=[]), ValueError, "plans and batch_sizes must name at least one"),
        (dict(plans="R1"), ValueError, "R needs the velocity"),
        (dict(batch_sizes=[]), ValueError, "plans and batch_sizes must name at least one"),
        (dict(batch_sizes=[2, 0]), ValueError, "batch_sizes must be at least 1, got 0"),
        (dict(batch_sizes=[True]), TypeError, "batch_sizes must be a whole number, got True"),
        (dict(output="uint8"), ValueError, "needs a model that was loaded with a vae"),
        (dict(guidance_channels=9), ValueError, "guidance_channels must be from 1 to 4, got 9"),
        (
            dict(batch_sizes=range(1, 10)),
            ft.CaptureError,
            "there are 8 captures made ahead already: raise model.captures.limit",
        ),
    ],
)
def test_what_compile_refuses(arguments, kind, said):
    model, _ = captured_model()
    with pytest.raises(kind, match=said):
        ft.compile(**{"model": model, "plans": "E1", **arguments})


def test_the_summary_tells_cost_and_gain():
    model, recorder = captured_model()
    ft.compile(model, "H1R1", 3)
    ft.sample(model, "H1R1", LABELS, guidance=2.0, seed=0)
    recorder.failures = [RuntimeError("no luck")]
    ft.sample(model, "E1", LABELS, seed=0)
    with pytest.warns(UserWarning, match="no luck"):
        ft.sample(model, "E1", LABELS, seed=0)
    first, second = ft.summary(model).splitlines()
    assert first.startswith(
        "plan H1R1 with guidance to latents, batch 3: 250.00 ms a replay, 250.00 ms without a "
        "graph (1.00 times)"
    )
    assert "1 MiB" in first
    assert first.endswith("ahead of time, replayed 1 times")
    assert second == (
        "plan E1 without guidance to latents, batch 3: without a graph, since capturing plan E1 "
        "without guidance to latents "
        "failed (RuntimeError: no luck)"
    )


# Weights


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


# What turns captures off


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

    monkeypatch.setattr(graph, "CudaRecorder", Placed)
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
        [made] = ft.compile(model, "H1P1R1", 3)
    assert ft.sample(model, "H1P1R1", LABELS, guidance=2.0, seed=0).equal(
        plain("H1P1R1", LABELS, guidance=2.0, seed=0)
    )
    assert (recorder.recorded, made.hits) == (1, 1)


def test_no_capture_is_part_of_anybodys_gradients():
    captures = Captures(recorder=Fake())
    x = torch.ones(2, requires_grad=True)
    captures.precapture(Key("it", 2), lambda x: x * 2, {"x": x}, [])
    assert captures.run(Key("it", 2), lambda x: x * 2, {"x": x}, []).tolist() == [2.0, 2.0]
    [made] = captures.report()
    assert not made.inputs["x"].requires_grad
    assert not made.result.requires_grad


# What goes wrong


def test_a_capture_that_fails_is_said_once_and_the_run_goes_on():
    model, recorder = captured_model()
    ft.sample(model, "H1", LABELS, seed=0)
    recorder.failures = [RuntimeError("operation not permitted\nwhen capturing")]
    with pytest.warns(
        UserWarning,
        match=(
            r"capturing plan H1 .* failed \(RuntimeError: operation not permitted\); it runs "
            r"without"
        ),
    ):
        result = ft.sample(model, "H1", LABELS, seed=0)
    assert result.equal(plain("H1", LABELS, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ft.sample(model, "H1", LABELS, seed=0).equal(result)
    assert recorder.recorded == 0
    assert ft.compile(model, "H1", 3, guided=False)  # asked by name it is tried again
    ft.sample(model, "H1", LABELS, seed=0)
    assert model.captures.report()[0].hits == 1


OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd much more")


def test_out_of_memory_gives_up_other_captures_and_tries_again():
    model, recorder = captured_model()
    ft.compile(model, ["E1", "E2"])
    recorder.failures = [OOM]
    [made] = ft.compile(model, "E3")
    assert model.captures.report() == [made]


def test_out_of_memory_for_good_leaves_the_model_usable_and_says_what_was_asked_for():
    model, recorder = captured_model()
    said = "capturing plan H8 with guidance to latents for 64 images ran out of memory .*20.00 GiB"
    recorder.failures = [OOM, OOM]
    with pytest.raises(ft.CaptureError, match=said):
        ft.compile(model, "H8", 64)
    assert model.captures.report() == []
    assert recorder.released
    for _ in range(3):
        assert ft.sample(model, "H1", LABELS, seed=0).equal(plain("H1", LABELS, seed=0))
    ft.sample(model, "E1", LABELS, seed=0)
    recorder.failures = [OOM, OOM]
    with pytest.warns(UserWarning, match="ran out of memory"):
        assert ft.sample(model, "E1", LABELS, seed=0).equal(plain("E1", LABELS, seed=0))


@pytest.mark.parametrize(
    "said", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"]
)
def test_libraries_lack_memory_too(said):
    model, recorder = captured_model()
    ft.compile(model, ["E1", "E2"])
    recorder.failures = [RuntimeError(said)]
    [made] = ft.compile(model, "E3")
    assert model.captures.report() == [made]


def test_a_first_run_that_lacks_memory_makes_compile_fail_as_it_says():
    model, _ = captured_model()
    original = model.predictor.evaluate

    def evaluate(*args: object) -> Tensor:
        raise OOM

    model.predictor.evaluate = evaluate
    with pytest.raises(
        ft.CaptureError,
        match="capturing plan H8 with guidance to latents for 64 images ran out of memory",
    ):
        ft.compile(model, "H8", 64)
    model.predictor.evaluate = original
    assert ft.sample(model, "H1", LABELS, seed=0).equal(plain("H1", LABELS, seed=0))


def test_what_a_failed_body_had_made_is_let_go_before_memory_is_given_back():
    captures, recorder = Captures(recorder=Fake()), Fake()
    captures.recorder = recorder
    made, seen = [], []

    def deeper(x: Tensor) -> Tensor:
        partial = x + 1
        made.append(weakref.ref(partial))
        raise OOM.with_traceback(None)

    def body(x: Tensor) -> Tensor:
        partial = x + 2
        made.append(weakref.ref(partial))
        try:
            return deeper(partial)
        except torch.OutOfMemoryError:
            raise torch.OutOfMemoryError("again") from None

    recorder.release = lambda: seen.append([tensor() is None for tensor in made])
    try:
        raise ValueError("the caller's own")
    except ValueError as error:
        mine = error
        with pytest.raises(ft.CaptureError, match="ran out of memory"):
            captures.precapture(Key("it", 1), body, {"x": torch.zeros(1)}, [])
    assert seen[0] == [True, True]
    assert seen[1] == [True] * 4
    assert mine.__traceback__ is not None


def test_captures_make_room_for_a_run_that_has_none():
    model, _ = captured_model()
    ft.compile(model, "E1", 3)
    failures = [OOM]
    original = model.predictor.evaluate

    def evaluate(*args: object) -> Tensor:
        if failures and len(model.captures.report()):
            raise failures.pop()
        return original(*args)

    model.predictor.evaluate = evaluate
    assert ft.sample(model, "H1", LABELS, seed=0).equal(plain("H1", LABELS, seed=0))
    assert model.captures.report() == []


# Threads


def test_concurrent_calls_give_the_results_of_sequential_ones():
    model, recorder = captured_model(limit=2)
    plans = ["H1R1", "E2", "H1P1"]
    work = [(plans[n % 3], [n % 10, (n + 3) % 10], 1.0 + n % 2, n) for n in range(36)]
    truth = [
        plain(plan, labels, guidance=guidance, seed=seed) for plan, labels, guidance, seed in work
    ]

    def one(job: tuple[str, list[int], float, int]) -> Tensor:
        plan, labels, guidance, seed = job
        return ft.sample(model, plan, labels, guidance=guidance, seed=seed)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, work))
    assert all(a.equal(b) for a, b in zip(results, truth, strict=True))
    assert recorder.replayed > 6
    assert len(model.captures.report()) == 2


def test_models_record_one_after_another():
    """To wait for the device breaks a recording in any other thread."""
    alone, start = threading.Lock(), threading.Barrier(4)

    class Lonely(Fake):
        def seconds(self, run: Callable[[], object]) -> float:
            assert alone.acquire(blocking=False), "waited for the device beside a recording"
            alone.release()
            return super().seconds(run)

        def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
            assert alone.acquire(blocking=False), "two recordings at once"
            try:
                time.sleep(0.02)  # so that others come by, were they let
                return super().record(run)
            finally:
                alone.release()

    def one(number: int) -> int:
        captures = Captures(recorder=Lonely())
        start.wait()
        for what in range(3):
            captures.precapture(Key(what, 1), lambda x: x + 1, {"x": torch.zeros(1)}, [])
        return len(captures.report())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [3] * 4
