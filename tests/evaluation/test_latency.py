"""flowturbo bench: what it times, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_recorder import captured_model
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile, record_function

import flowturbo as ft
from flowturbo.evaluation.latency import Bench, bench, measure, operations_table, profile_run
from flowturbo.models.random_weights import filled, untrained
from flowturbo_kernels import linear


def test_the_table_and_the_file_hold_every_plan_and_batch(tmp_path):
    out = tmp_path / "new" / "latency.json"
    text = bench(Bench(plans=("E2", "H1R1"), batch_sizes=(1, 3), repeats=2, out=out))
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == ["E2", "E2", "H1R1", "H1R1"]
    report = json.loads(out.read_text())
    assert report["environment"]["model"] == "digits"
    assert report["environment"]["output"] == "uint8"
    for timing in report["timings"]:
        assert 0 < timing["fastest"] <= timing["seconds"] <= timing["slowest"]
        assert 0 < timing["decode_seconds"] < timing["seconds"] < 2 * timing["first_seconds"] + 1
        assert timing["peak_bytes"] is None


def test_a_profile_is_a_trace_and_a_table_of_operations(tmp_path):
    bench(Bench(plans=("H1R1",), batch_sizes=(2,), repeats=1, profile=tmp_path / "profile"))
    trace = json.loads((tmp_path / "profile" / "H1R1-batch2.trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    blocks = 2 * 12 + 2 * 1  # two predictor calls of twelve blocks, two refiner calls of one
    assert names.count("flowturbo::attention") == blocks
    text = (tmp_path / "profile" / "H1R1-batch2.md").read_text()
    cells = {
        row.split(" | ")[0].removeprefix("| "): row.split(" | ")
        for row in text.splitlines()
        if row.startswith("| ")
    }
    assert cells["flowturbo::attention"][1] == str(blocks)
    shares = [float(row[3].removesuffix(" % |")) for name, row in cells.items() if "::" in name]
    assert sum(shares) == pytest.approx(100, abs=3)
    assert shares == sorted(shares, reverse=True)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "H1R1-batch2.md",
        "H1R1-batch2.trace.json",
    ]


def test_operations_hold_what_torch_does_inside_them():
    """torch's own operations are listed only outside ours, and once: not those that they call
    themselves.
    """

    class Event:
        device_type = DeviceType.CPU

        def __init__(self, name, time, parent=None):
            self.name, self.cpu_time_total, self.cpu_parent = name, time, parent

    ours = Event("flowturbo::linear", 2000)
    inside = Event("aten::linear", 1900, ours)
    outside = Event("aten::cat", 500)
    events = [
        ours,
        inside,
        Event("aten::addmm", 1800, inside),
        outside,
        Event("aten::copy_", 400, outside),
        Event("other", 9999),
    ]
    text = operations_table(events, cuda=False)
    assert "| flowturbo::linear | 1 | 2.000 | 80.0 % |" in text
    assert "| aten::cat | 1 | 0.500 | 20.0 % |" in text
    assert "addmm" not in text
    assert "copy_" not in text
    assert "| all | 2 | 2.500 | |" in text


def test_an_operation_is_a_function_to_the_profiler():
    """No kernel is linked to a user's range, as which torch.profiler.record_function marks what is
    in it.
    """
    with profile() as trace:
        linear(torch.randn(3, 8), torch.randn(4, 8), torch.randn(4))
        with record_function("a user's range"):
            pass
    scopes = {event.name: (event.scope, event.is_user_annotation) for event in trace.events()}
    assert scopes["flowturbo::linear"] == scopes["aten::addmm"] == (0, False)
    assert scopes["a user's range"][1]


def test_on_cuda_an_operations_time_is_that_of_the_kernels_it_launched_once():
    """Of a real trace of the CPU's side, with kernels linked as torch links them, to functions
    alone.
    """
    with profile() as trace:
        for _ in range(2):
            linear(torch.randn(3, 8), torch.randn(4, 8), torch.randn(4))
        torch.randn(5)
    events = list(trace.events())
    launches = {
        "flowturbo::linear": 30.0,
        "aten::addmm": 400.0,
        "aten::normal_": 5.0,
    }  # microseconds
    device = []
    for event in events:
        event.use_device = "cuda"
        if event.name in launches:
            if event.scope == 0:
                event.append_kernel("kernel", 0, launches[event.name])
            device.append(on_device(f"kernel of {event.name}", launches[event.name]))
        if event.name.startswith("flowturbo::"):
            device.append(on_device(event.name, 999.0, is_user_annotation=True))
    device.append(on_device("Memset", 70.0))
    ours = [event for event in events if event.name == "flowturbo::linear"]
    assert [event.device_time_total for event in ours] == [
        430.0,
        430.0,
    ]  # its own kernel, and that of torch's product in it
    calls = sum(
        event.name == "aten::normal_" for event in events
    )  # outside: those that made the arguments
    table = operations_table([*events, *device], cuda=True)
    rows = {
        row.split(" | ")[0].removeprefix("| "): row.split(" | ")[1:]
        for row in table.splitlines()
        if row.startswith("| ")
    }
    assert rows["flowturbo::linear"][:2] == ["2", "0.860"]
    assert rows["aten::randn"][:2] == [str(calls), f"{calls * 5e-3:.3f}"]
    assert rows["outside all operations"][:2] == ["", "0.070"]
    assert "aten::addmm" not in rows
    assert rows["all"][1] == f"{0.860 + calls * 5e-3 + 0.070:.3f}"


def on_device(name: str, microseconds: float, is_user_annotation: bool = False) -> FunctionEvent:
    return FunctionEvent(
        id=0,
        name=name,
        thread=0,
        start_us=0.0,
        end_us=microseconds,
        use_device="cuda",
        device_type=DeviceType.CUDA,
        is_user_annotation=is_user_annotation,
    )


def test_profiling_runs_without_graphs_and_leaves_the_limit(tmp_path):
    model, recorder = captured_model()
    profile_run(model, "E2", 2, 1.5, "latents", tmp_path)
    assert recorder.recorded == 0
    assert model.captures.limit == 8


def test_what_is_timed_is_replayed_where_there_are_graphs():
    model, recorder = captured_model()
    timing = measure(model, "E2", 2, 1.5, "latents", repeats=3)
    assert recorder.recorded == 1
    assert model.captures.report()[0].hits == 5  # the first, a warm one, and three timed
    assert timing.decode_seconds == 0


def test_the_memory_of_earlier_captures_is_given_back_before_it_is_counted():
    model, _ = captured_model()
    ft.compile(model, ["E1", "E3"], 2)
    assert len(model.captures.report()) == 2
    measure(model, "E2", 2, 1.5, "latents", repeats=1)
    assert [str(capture.key.what.plan) for capture in model.captures.report()] == ["E2"]


def test_untrained_weights_are_of_the_published_size_and_bounded():
    predictor, refiner = untrained("SiT-S/8", 128, torch.device("cpu"))
    assert predictor.config.side == 16
    assert (predictor.config.hidden, refiner.config.depth, refiner.config.reads_velocity) == (
        384,
        1,
        True,
    )
    model = ft.load(predictor, refiner, device="cpu", dtype=torch.float32)
    x = ft.sample(model, "H1R1", [1, 2], guidance=1.5, seed=0)
    assert x.isfinite().all()
    assert 0.1 < float(x.std()) < 100
    again = filled(predictor.config, torch.device("cpu"), 0)
    assert all(a.equal(b) for a, b in zip(again.parameters(), predictor.parameters(), strict=True))
    assert all((p != 0).any() for p in predictor.parameters())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(plans=("R1",)), "R needs the velocity"),
        (dict(plans=()), "plans and batch_sizes must name at least one"),
        (dict(batch_sizes=(0,)), "batch_sizes must be at least 1, got 0"),
        (dict(repeats=0), "repeats must be at least 1"),
        (dict(guidance=float("nan")), "guidance must be finite"),
        (dict(out="figures.txt"), "out must end in .json"),
        (dict(model="SiT-XL/3"), "neither a bundled model"),
        (dict(model="SiT-S/8", refiner="x.pt"), "refiner must be left out for random weights"),
        (dict(model="SiT-S/8", image_size=100), "image_size must be a multiple of 64"),
    ],
)
def test_what_is_refused(arguments, said):
    if "out" in arguments:
        arguments = {"out": Path(arguments["out"])}
    with pytest.raises(ValueError, match=said):
        bench(Bench(**arguments))
