"""What a plan must do in a pipeline of diffusers, and the outcome for each pipeline of the zoo.

The numbers come from outside flowturbo: calls of the scheduler and of the networks are recorded,
and the steps of the plan are taken again in float64, by their formulas.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo
from torch import Tensor, nn

import flowturbo as ft

PLANS = EULER, ADAMS, MIXED, AT_ZERO = "EEEE", "AAAA", "HPAE", "EEHP"
"""The last calls the network at noise level 0."""
BOUND, LOGARITHMS = 1e-6, 1e-5
"""Of relative errors in float32; against solvers that take logarithms of noise levels, which in
float32 are up to 6e-7 off after four steps.
"""

_TIMES = ("timestep", "timesteps", "t", "sigma", "timestep_ids", "vision_timesteps")


@dataclass
class Run:
    """The steps of one pass of one scheduler.

    levels: its sigmas. samples, velocities, returned: of each step.
    """

    levels: list[float]
    samples: list[Tensor] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)


@dataclass
class Trace:
    """One call of a pipeline: what it returned, its schedulers' runs, and what times its networks
    were told, in order.
    """

    output: list[Tensor]
    runs: list[Run]
    times: list[list[float]]


def tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors in a pipeline's output, in order."""
    if isinstance(value, Tensor):
        return [value.detach().clone()] if value.is_floating_point() else []
    if hasattr(value, "__array__") and not hasattr(value, "mode"):
        return [torch.as_tensor(value).clone()]
    if hasattr(value, "values"):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def error(value: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error, by the 2-norm, of tensors against others."""
    assert [v.shape for v in value] == [e.shape for e in expected]
    return max(
        float((v.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30))
        for v, e in zip(value, expected, strict=True)
    )


def call(case: zoo.Case, steps: int) -> Any:
    """The pipeline's result for its arguments, always from the same noise."""
    signature = inspect.signature(type(case.pipe).__call__).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    options = dict(case.arguments)
    if case.steps is not None:
        options[case.steps] = steps
    if free or "generator" in signature:
        options["generator"] = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of what asks no generator
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return case.pipe(**options)


def traced(case: zoo.Case, steps: int) -> Trace:
    """The call, with what its schedulers and networks did."""
    runs, times, parts = list[Run](), list[list[float]](), _parts(case.pipe)
    with ExitStack() as stack:
        for kind in {type(p) for p in parts if hasattr(p, "set_timesteps")}:
            stack.enter_context(_recorded_steps(kind, runs))
        for network in [p for p in parts if isinstance(p, nn.Module)]:
            name = next((n for n in _TIMES if n in _parameters(network)), None)
            if name is not None:
                hook = functools.partial(_record_time, times, name)
                stack.callback(network.register_forward_pre_hook(hook, with_kwargs=True).remove)
        output = tensors(call(case, steps))
    return Trace(output, runs, times)


def _parts(pipe: Any) -> list[Any]:
    """The components of a pipeline, and of pipelines inside it, each once."""
    found: dict[int, Any] = {}
    for part in vars(pipe).values():
        inner = (
            _parts(part)
            if hasattr(part, "save_pretrained") and hasattr(part, "components")
            else [part]
        )
        found |= {id(p): p for p in inner}
    return list(found.values())


def _parameters(network: nn.Module) -> Any:
    return inspect.signature(type(network).forward).parameters


def _record_time(times: Any, name: str, network: nn.Module, given: Any, named: Any) -> None:
    bound = inspect.signature(network.forward).bind(*given, **named).arguments
    if bound.get(name) is not None:
        times.append(torch.as_tensor(bound[name]).detach().double().flatten().tolist())


@contextmanager
def _recorded_steps(kind: type[Any], runs: list[Run]) -> Iterator[None]:
    """Inside the block, record the steps of all schedulers of this class."""
    step, set_timesteps, signature = kind.step, kind.set_timesteps, inspect.signature(kind.step)
    current: dict[int, tuple[Any, Run]] = {}  # with the scheduler, so that its id stays its own

    def recorded_step(self: Any, *args: Any, **options: Any) -> Any:
        if id(self) not in current:
            current[id(self)] = self, Run([float(s) for s in getattr(self, "sigmas", ())])
            runs.append(current[id(self)][1])
        given, run = signature.bind(self, *args, **options).arguments, current[id(self)][1]
        run.samples.append(given["sample"].detach().double().clone())
        run.velocities.append(-given["model_output"].detach().double().clone())
        result = step(self, *args, **options)
        value = result[0] if isinstance(result, tuple) else result.prev_sample
        run.returned.append(value.detach().double().clone())
        return result

    def recorded_set_timesteps(self: Any, *args: Any, **options: Any) -> Any:
        current.pop(id(self), None)
        return set_timesteps(self, *args, **options)

    # What inspects the signature, as diffusers' retrieve_timesteps does, must see the stock's.
    functools.update_wrapper(recorded_step, step)
    functools.update_wrapper(recorded_set_timesteps, set_timesteps)
    own = {name: vars(kind).get(name) for name in ("step", "set_timesteps")}
    kind.step, kind.set_timesteps = recorded_step, recorded_set_timesteps
    try:
        yield
    finally:
        for name, value in own.items():
            if value is None:
                delattr(kind, name)
            else:
                setattr(kind, name, value)


def call_places(letters: str) -> list[tuple[int, int]]:
    """Of each predictor call: the number of its step, and of the grid's level where it is made.

    H calls at both ends of its step, P at the end, having a velocity for the start; A and E call at
    the start.
    """
    ends = {"H": (0, 1), "P": (1,), "A": (0,), "E": (0,)}
    return [(i, i + end) for i, letter in enumerate(letters) for end in ends[letter]]


def positions(
    letters: str, levels: Sequence[float], first: int, x: Tensor
) -> Generator[Tensor, tuple[Tensor, Tensor], None]:
    """The steps by their formulas: yields where each velocity is needed, and the result.

    It is sent each velocity, and the change that the pipeline made to the latents before that call.
    levels: the noise levels of the grid; a step is as long as the difference of two.
    first: the number of the first predictor call. If it is at the end of its step, there is no
        velocity for the start: the step is left out, and the velocity kept for the next.
    """
    places = call_places(letters)
    begin, level = places[first]
    cached = past = None
    if level != begin:
        cached, change = yield x
        x, begin = x + change, begin + 1
    for i in range(begin, len(letters)):
        dt = levels[i] - levels[i + 1]
        if letters[i] in "HP":
            if letters[i] == "P" and cached is not None:
                v = cached
            else:
                v, change = yield x
                x = x + change
            v_end, change = yield x + dt * v
            x, cached, past = x + change + dt / 2 * (v + v_end), v_end, (levels[i], v)
            continue
        v, change = yield x
        x, cached = x + change, None
        if letters[i] == "A" and past is not None:
            since = past[0] - levels[i]
            x = x + dt * v + dt**2 / (2 * since) * (v - past[1])
        else:
            x = x + dt * v
        past = (levels[i], v)
    yield x


def recursion_error(run: Run, letters: str) -> float:
    """The largest relative error of what the scheduler returned, against `positions`.

    It is infinite if the run has more calls than the plan, or two noise levels at one place.
    """
    places = call_places(letters)
    first = len(places) - len(run.velocities)
    grid = {len(letters): run.levels[-1]}
    for (_, place), level in zip(places, run.levels, strict=False):
        if grid.setdefault(place, level) != level:
            return math.inf
    if first < 0 or len(grid) <= len(letters):
        return math.inf
    levels = [grid[place] for place in range(len(letters) + 1)]
    steps = positions(letters, levels, first, run.samples[0])
    errors, size, before = list[float](), 1e-30, next(steps)
    for sample, v, returned in zip(run.samples, run.velocities, run.returned, strict=True):
        change = sample - before
        before = steps.send((v, change))
        # Rounded in float32 at the largest so far: Cosmos 2 begins with 80 times the noise.
        size = max(size, float(sample.norm()))
        errors.append(float((returned - before).norm()) / size)
        before = returned
    return float(torch.tensor(errors).max())  # NaN if one is


@dataclass(frozen=True)
class Outcome:
    """What came of a pipeline.

    name: its class, and after a colon what is special about it. scheduler: the class of its own.
    refused: accelerate's message for each plan that it refused.
    errors: the largest relative error of each plan against the recursion; of "stock", the E plan's
        result against the pipeline's own; or of "order one", against its own solver at order one.
    faults: what is wrong, in words.
    """

    name: str
    scheduler: str
    refused: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    note: str = ""


@functools.cache
def outcome(name: str) -> Outcome:
    """Walk through a pipeline of the zoo: stock, the plans, and restored."""
    case = zoo.builders()[name]()
    kind, scheduler, steps = type(case.pipe), case.pipe.scheduler, len(EULER)
    assert kind.__name__ == name.partition(":")[0]
    stock = traced(case, steps)
    anatomy = _anatomy(case.pipe)
    assert stock.output
    assert all(bool(t.isfinite().all()) for t in stock.output)
    refused, traces, faults = dict[str, str](), dict[str, Trace](), list[str]()
    for letters in PLANS:
        try:
            traces[letters] = _with_plan(case, letters, steps)
        except Refused as why:
            refused[letters] = str(why)
        except Exception as crash:
            faults.append(f"{letters}: {type(crash).__name__}: {crash}")
    errors = {
        letters: max((recursion_error(run, letters) for run in trace.runs), default=math.inf)
        for letters, trace in traces.items()
    }
    if EULER in traces and (euler := _of_first_order(scheduler)) is not None:
        if euler is scheduler:
            errors["stock"] = error(traces[EULER].output, stock.output)
        else:
            with _swapped(case.pipe, euler):
                errors["order one"] = error(traces[EULER].output, tensors(call(case, steps)))
    for plan, e in errors.items():
        if not e <= (LOGARITHMS if plan == "order one" else BOUND):  # NaN is wrong, too
            faults.append(f"{plan}: {e:.1e} off")
    faults += _differences(stock, traces)
    restored = traced(case, steps)
    if case.pipe.scheduler is not scheduler or _anatomy(case.pipe) != anatomy:
        faults.append("not restored")
    if error(restored.output, stock.output) != 0 or restored.times != stock.times:
        faults.append("restored differs from before")
    return Outcome(name, type(scheduler).__name__, refused, errors, tuple(faults), case.note)


def _of_first_order(scheduler: Any) -> Any:
    """The scheduler, or the like of it, that takes Euler's steps; None if there is none.

    On flow sigmas those are the steps of UniPC without its corrector and of DPM++, at order one.
    """
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        return scheduler
    first = {"solver_order": 1, "disable_corrector": list(range(1000))}
    options = {name: value for name, value in first.items() if name in scheduler.config}
    return type(scheduler).from_config(scheduler.config, **options) if options else None


@contextmanager
def _swapped(pipe: Any, scheduler: Any) -> Iterator[None]:
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


def _anatomy(pipe: Any) -> Any:
    """What a pipeline is made of: its class, attributes, configuration, components and hooks."""
    parts = _parts(pipe)
    modules = [m for p in parts if isinstance(p, nn.Module) for m in p.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    patched = sum("forward" in vars(m) for m in modules)
    components = [id(p) for p in parts if hasattr(p, "config")]
    return type(pipe), set(vars(pipe)), dict(pipe.config), components, hooks, patched


class Refused(Exception):
    """accelerate refused the pipeline."""


def _with_plan(case: zoo.Case, letters: str, steps: int) -> Trace:
    try:
        ft.accelerate(case.pipe, letters)
    except (TypeError, ValueError) as why:
        raise Refused(str(why)) from None
    try:
        # How many steps are asked for means nothing but to E, which is to be as many.
        return traced(case, steps if letters == EULER else steps + 3)
    finally:
        ft.restore(case.pipe)


def _differences(stock: Trace, traces: dict[str, Trace]) -> list[str]:
    """What differs between plans and stock that should be equal, and is equal but should differ."""
    faults = []
    for letters, trace in traces.items():
        if not all(bool(t.isfinite().all()) for t in trace.output):
            faults.append(f"{letters}: the result has NaN or infinity")
        if letters in (EULER, ADAMS):
            if not _close(trace.times, stock.times):
                faults.append(f"{letters}: the networks are told other timesteps than stock's")
            if not _close([r.levels for r in trace.runs], [r.levels for r in stock.runs]):
                faults.append(f"{letters}: other noise levels than stock's")
        for run, other in zip(trace.runs, stock.runs, strict=False):
            if not _close([run.levels[:1], run.levels[-1:]], [other.levels[:1], other.levels[-1:]]):
                faults.append(f"{letters}: the noise levels begin or end elsewhere than stock's")
    both = {EULER, ADAMS} <= traces.keys()
    if both and error(traces[ADAMS].output, traces[EULER].output) < 1e-4:
        faults.append("A and E plans give the same")
    return faults


def _close(values: Any, expected: Any) -> bool:
    return len(values) == len(expected) and all(
        len(v) == len(e) and bool(torch.isclose(torch.tensor(v), torch.tensor(e), 1e-6, 1e-9).all())
        for v, e in zip(values, expected, strict=True)
    )
