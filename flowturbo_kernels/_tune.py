"""The fastest of several ways of running an operation, measured once for a device and a question, and remembered on disk."""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._cache import cache_folder, locked, whole_file
from ._graphs import RECORDING, GraphPool

_REPEATS = 20
"""Calls in one replay; more where more copies of the weights are needed."""
_ROUNDS = 5
"""Timed replays; their median counts."""
_MOST_COPIES = 64
_NOISY = 0.25
"""How far the winner's median may lie above its fastest replay, as a share, before its choice is not worth keeping."""

Candidate = Callable[..., Any]
"""A way of running the operation: a function of the tensors that are cold in a plan."""

_known: dict[Path, dict[str, str]] = {}
_watchers: ContextVar[tuple[list[str], ...]] = ContextVar("flowturbo_choices", default=())


def fastest(key: str, candidates: Mapping[str, Candidate], device: torch.device, cold: Sequence[Tensor] = ()) -> str:
    """The name of the candidate that runs fastest on the device.

    key: names operation, shapes and dtypes. The names of the candidates belong to the question too: another backend, which has
    others, gets an answer of its own. cold: tensors that every candidate is called with and that a plan reads once a call, i.e.
    weights: they are timed on copies that rotate, since one that lay in the second-level cache would favour other candidates.
    What is written just before, activations, is left as it is.

    The first candidate is the default: it is taken, and nothing measured or remembered, off CUDA and while a CUDA graph is being
    captured, which forbids measuring. A candidate that fails is taken only if all do. What is written to disk is a choice in which
    no candidate failed for a reason that may pass, such as a lack of memory, and whose timings were steady; others hold for this
    process alone.
    """
    default = next(iter(candidates))
    if device.type != "cuda" or len(candidates) == 1:
        return _seen(default)
    key = _question(key, candidates)
    file = _file(device)
    choice = _remembered(file).get(key)
    if choice in candidates:
        return _seen(str(choice))
    if torch.cuda.is_current_stream_capturing():
        return _seen(default)
    with RECORDING:
        known = _remembered(file)
        choice = known.get(key)  # another thread may have measured it meanwhile
        if choice not in candidates:
            choice, worth_keeping = _measured(candidates, device, cold)
            known[key] = choice
            if worth_keeping:
                _save(file, device, key, choice, known)
    return _seen(str(choice))


@contextmanager
def choices() -> Iterator[list[str]]:
    """What is taken for operations run inside, in order: names of candidates."""
    seen: list[str] = []
    token = _watchers.set((*_watchers.get(), seen))
    try:
        yield seen
    finally:
        _watchers.reset(token)


def _seen(choice: str) -> str:
    for watcher in _watchers.get():
        watcher.append(choice)
    return choice


def _question(key: str, candidates: Mapping[str, Candidate]) -> str:
    names = hashlib.sha256("\n".join(candidates).encode()).hexdigest()[:12]
    return f"{key}, float32 {torch.get_float32_matmul_precision()}, {len(candidates)} candidates {names}"


# Measuring


def _measured(candidates: Mapping[str, Candidate], device: torch.device, cold: Sequence[Tensor]) -> tuple[str, bool]:
    """(the fastest, whether that is worth keeping)."""
    worth_keeping = True
    times: dict[str, list[float]] = {}
    rotating = copies(cold, device)
    for name, run in candidates.items():
        try:
            times[name] = timings(run, rotating, device)
        except Exception as error:  # whatever a compiler or a library may raise for a shape that it can't do
            worth_keeping = worth_keeping and _is_a_fact(error)
    del rotating
    _give_back()
    if not times:
        return next(iter(candidates)), False
    best = min(times, key=lambda name: statistics.median(times[name]))
    steady = statistics.median(times[best]) <= (1 + _NOISY) * min(times[best])
    return best, worth_keeping and steady


def _is_a_fact(error: Exception) -> bool:
    """Whether this candidate fails on every such device: Triton's own errors say so, i.e. what does not compile or does not fit.

    What CUDA and its libraries raise may be the crowd on a GPU.
    """
    return type(error).__module__.split(".")[0] == "triton"


def copies(cold: Sequence[Tensor], device: torch.device) -> list[tuple[Tensor, ...]]:
    """The cold tensors, and copies, until they fill the second-level cache several times; in at most half the free memory."""
    size = sum(t.numel() * t.element_size() for t in cold)
    if not size:
        return [tuple(cold)]
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    count = min(_MOST_COPIES, -(-4 * cache // size), 1 + torch.cuda.mem_get_info(device)[0] // 2 // size)
    return [tuple(cold), *(tuple(t.clone() for t in cold) for _ in range(count - 1))]


def timings(run: Candidate, rotating: Sequence[tuple[Tensor, ...]], device: torch.device) -> list[float]:
    """Seconds of one call on the device, of each round: of replays of a graph of many, as launches are gone in a plan."""
    pool, calls = _pool(device), max(_REPEATS, len(rotating))

    def all_calls() -> None:
        for i in range(calls):
            run(*rotating[i % len(rotating)])

    with torch.cuda.device(device):
        stream = pool.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(*rotating[0])  # compiles, which a capture may not
            _, graph = pool.record(all_calls)
            graph.replay()
            times = []
            for _ in range(_ROUNDS):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(stream)
                graph.replay()
                end.record(stream)
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3 / calls)
        torch.cuda.current_stream().wait_stream(stream)
    return times


@functools.cache
def _pool(device: torch.device) -> GraphPool:
    """One a device: every other stream that multiplies would keep a workspace of cuBLAS's, 32 MiB on Hopper."""
    return GraphPool(device)


def _give_back() -> None:
    """The memory of copies and captures."""
    torch.cuda.empty_cache()


# Remembering


def _remembered(file: Path) -> dict[str, str]:
    """What this process knows; at first, what earlier processes wrote."""
    if file not in _known:
        _known[file] = _read(file)
    return _known[file]


def _read(file: Path) -> dict[str, str]:
    """Nothing where the file is missing or damaged."""
    try:
        return {str(k): str(v) for k, v in json.loads(file.read_text())["fastest"].items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def _save(file: Path, device: torch.device, key: str, choice: str, known: dict[str, str]) -> None:
    """Add the choice to what is on disk now, also by other processes, which this one learns."""
    with locked(file):
        there = _read(file) | {key: choice}
        text = json.dumps({"of": facts(device), "fastest": there}, indent=1, sort_keys=True) + "\n"
        whole_file(file, text.encode())
    for other, taken in there.items():
        known.setdefault(other, taken)


def _file(device: torch.device) -> Path:
    """One file for all that decides beside the question: the name tells the device, a digest the rest, which stands inside."""
    found = _facts(device)
    digest = hashlib.sha256(repr(found).encode()).hexdigest()[:16]
    name = "".join(c if c.isalnum() or c in ".+" else "-" for c in str(dict(found)["device"]))[:80]
    return cache_folder() / f"fastest {name} {digest}.json".replace(" ", "-")


def facts(device: torch.device) -> dict[str, str]:
    """What decides beside shapes and dtypes which candidate is fastest: the device and its clocks, versions, our kernels."""
    return dict(_facts(device))


@functools.cache
def _facts(device: torch.device) -> tuple[tuple[str, str], ...]:
    properties = torch.cuda.get_device_properties(device)
    found = {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory, GiB": round(properties.total_memory / 2**30),
        "clocks": _clocks(device),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "cuBLAS": _version("nvidia-cublas", "nvidia-cublas-cu12"),
        "triton": _version("triton"),
        "kernels": _kernels(),
    }
    return tuple((name, str(value)) for name, value in found.items())


def _clocks(device: torch.device) -> str:
    """The most that multiprocessors and memory may run at, kHz, and the bus' bits: two cards of one name may differ in them."""
    try:
        from triton.runtime import driver

        index = torch.cuda.current_device() if device.index is None else device.index
        properties = driver.active.utils.get_device_properties(index)
        return ", ".join(str(properties.get(k)) for k in ("sm_clock_rate", "mem_clock_rate", "mem_bus_width"))
    except Exception:  # no Triton, or one that tells nothing: its driver is no public interface
        return "not known"


def _version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return "none"


def _kernels() -> str:
    """A digest of this package: a kernel that was changed is measured anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
