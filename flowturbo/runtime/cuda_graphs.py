"""CUDA graphs of whole runs, kept for replay in a bounded cache. It knows keys, tensors and
functions; no model, no plan.

A run under a new key is executed as it is, which compiles and measures whatever it needs; the
second one under that key is captured, and replayed from then on: inputs are copied into buffers of
the graph, the result is copied out.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowturbo_kernels.graphs import RECORDING

from .recorder import CudaRecorder, Recorder

_log = logging.getLogger(__name__)

Body = Callable[..., Tensor]
"""A run: inputs by name -> its result. It must do the same work whatever the inputs hold."""


class Key(NamedTuple):
    """What a capture is kept under. what: everything that decides the work but the number of
    images, which is `size`.
    """

    what: Hashable
    size: int


class CaptureError(RuntimeError):
    """A run could not be captured: it can still be executed as it is."""


@dataclass
class Capture:
    """A captured run and what it cost. memory: bytes that the device's allocator took for it,
    beyond those of earlier captures.

    seconds: to capture; eager, replay: of one run executed as it is, and of one replay.
    precaptured: whether it was asked for by name. Once it is given up, its figures stay and its
    memory goes, whoever still holds it.
    """

    key: Key
    inputs: dict[str, Tensor]
    result: Tensor
    replay: Callable[[], object]
    watched: Fingerprint
    memory: int
    seconds: float
    eager_seconds: float
    replay_seconds: float
    precaptured: bool = False
    hits: int = 0

    def give_up(self) -> None:
        self.inputs, self.result, self.replay, self.watched = (
            {},
            torch.empty(0),
            _given_up,
            Fingerprint(),
        )


def _given_up() -> None:
    raise RuntimeError("this capture was given up, and can't be replayed")


@dataclass
class Fingerprint:
    """Where the weights of modules lie. It holds the memory it names, so that a replay never reads
    what was given back.
    """

    addresses: list[int] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> Fingerprint:
        made = cls(addresses(modules))
        for module in modules:
            made.kept += [module, *(t.detach() for t in (*module.parameters(), *module.buffers()))]
        return made

    def fits(self, modules: Sequence[nn.Module]) -> bool:
        return self.addresses == addresses(modules)


def addresses(modules: Sequence[nn.Module]) -> list[int]:
    """The modules inside these and where their tensors lie: it changes when a weight is moved, cast
    or replaced, a module is put in another's place, or modules learn or forget."""
    found = []
    todo = list(modules)
    while todo:
        module = todo.pop()
        found += [id(module), module.training]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            found.append(0 if tensor is None else tensor.data_ptr())
        todo += [child for child in module._modules.values() if child is not None]
    return found


class Captures:
    """The captured runs of one model: at most `limit`, the least recently used given up first,
    those made ahead last.

    limit: may be changed at any time. recorder: None: CUDA graphs on CUDA devices, and elsewhere
        nothing is captured.
    """

    def __init__(self, limit: int = 8, recorder: Recorder | None = None) -> None:
        self.limit, self.recorder = limit, recorder
        self._lock = threading.RLock()
        self._kept: OrderedDict[Key, Capture] = OrderedDict()
        self._met: OrderedDict[Key, str | None] = (
            OrderedDict()
        )  # keys run before -> why they can't be captured

    def __reduce__(self) -> tuple[type[Captures], tuple[int]]:
        return Captures, (self.limit,)  # a copy of a model has other weights

    def possible(self, device: torch.device) -> bool:
        """Whether runs on that device can be captured now."""
        if self.limit < 1 or torch.is_autocast_enabled(device.type):
            return False
        if device.type == "cuda":
            return not torch.cuda.is_current_stream_capturing()
        return self.recorder is not None and not isinstance(self.recorder, CudaRecorder)

    def report(self) -> list[Capture]:
        """What is captured now, the least recently used first."""
        with self._lock:
            return list(self._kept.values())

    def refused(self) -> dict[Key, str]:
        """Runs that could not be captured, and why."""
        with self._lock:
            return {key: why for key, why in self._met.items() if why is not None}

    def __str__(self) -> str:
        """A line a capture, and a line for each run that could not be captured."""
        lines = []
        for c in self.report():
            gain = c.eager_seconds / c.replay_seconds if c.replay_seconds else float("nan")
            lines.append(
                f"{c.key.what}, batch {c.key.size}: {c.replay_seconds * 1e3:.2f} ms a replay, "
                f"{c.eager_seconds * 1e3:.2f} ms without a graph ({gain:.2f} times), "
                f"{c.memory / 2**20:.0f} MiB, "
                f"captured in {c.seconds:.2f} s{' ahead of time' if c.precaptured else ''}, "
                "replayed "
                f"{c.hits} times"
            )
        lines += [
            f"{key.what}, batch {key.size}: without a graph, since {why}"
            for key, why in self.refused().items()
        ]
        return "\n".join(lines) or "nothing is captured"

    def clear(self) -> None:
        """Give up all captures and their memory."""
        with self._lock:
            self._drop(self._kept.values())
            self._met.clear()
            if self.recorder is not None:
                self.recorder.release()

    def size_for(self, what: Hashable, count: int) -> int | None:
        """The smallest size captured ahead that holds `count` images."""
        with self._lock:
            return min(
                (
                    k.size
                    for k, c in self._kept.items()
                    if c.precaptured and k.what == what and k.size >= count
                ),
                default=None,
            )

    def run(
        self, key: Key, body: Body, inputs: Mapping[str, Tensor], modules: Sequence[nn.Module]
    ) -> Tensor:
        """The body's result on these inputs, by replay where it is captured. modules: all whose
        weights the body reads.
        """
        with self._lock:
            while True:
                capture = self._kept.get(key)
                if capture is None:
                    if key not in self._met or self._met[key] is not None:
                        self._meet(key, self._met.get(key))
                        break
                    try:
                        capture = self._capture(key, body, inputs, modules)
                    except CaptureError as error:
                        warnings.warn(f"{error}; it runs without a graph", stacklevel=3)
                        break
                result = self._replay(capture, inputs)
                if capture.watched.fits(modules):  # looked at while the device works
                    return result
                _log.info("weights moved: captures are made anew")
                self._drop(c for c in self._kept.values() if not c.watched.fits(modules))
        return body(**inputs)

    def precapture(
        self, key: Key, body: Body, inputs: Mapping[str, Tensor], modules: Sequence[nn.Module]
    ) -> Capture:
        """Capture now, and keep it before those that came by themselves. CaptureError where it
        can't be.
        """
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or not kept.watched.fits(modules):
                if sum(c.precaptured for c in self._kept.values() if c.key != key) >= self.limit:
                    raise CaptureError(
                        f"there are {self.limit} captures made ahead already: raise "
                        "model.captures.limit for more"
                    )
                self._drop([kept] if kept is not None else [])
                kept = self._capture(key, body, inputs, modules, first=True)
            kept.precaptured = True
            return kept

    def _meet(self, key: Key, why: str | None) -> None:
        self._met[key] = why
        self._met.move_to_end(key)
        while len(self._met) > 64 + 4 * self.limit:
            self._met.popitem(last=False)

    def _drop(self, captures: Iterable[Capture]) -> None:
        """Give up captures, once the device has done the replays that were asked for: others may
        write to their memory at once.
        """
        gone = list(captures)
        if gone and self.recorder is not None:
            self.recorder.settle()
        for capture in gone:
            del self._kept[capture.key]
            capture.give_up()

    def _capture(
        self,
        key: Key,
        body: Body,
        inputs: Mapping[str, Tensor],
        modules: Sequence[nn.Module],
        first: bool = False,
    ) -> Capture:
        """first: whether the body may have to compile and measure what it needs."""
        device = next(iter(inputs.values())).device
        if (
            self.recorder is None or getattr(self.recorder, "device", device) != device
        ):  # the model is on another one now
            self._drop(self._kept.values())
            self.recorder = CudaRecorder(device)
        while len(self._kept) >= self.limit:
            self._drop(
                [min(self._kept.values(), key=lambda c: c.precaptured)]
            )  # the first of the smallest: the least recent
        outer = sys.exc_info()[1]  # what the caller may be handling
        for last_try in (False, True):
            try:
                made = self._record(self.recorder, key, body, inputs, modules, first)
                break
            except Exception as error:  # whatever a body, a compiler or a driver may raise
                _let_go(error, outer)
                if not _lacks_memory(error):
                    why = (
                        f"capturing {key.what} failed ({type(error).__name__}: "
                        f"{_first_line(error)})"
                    )
                    raise self._refuse(key, why) from error
                self._drop(self._kept.values())
                self.recorder.release()
                if last_try:
                    why = (
                        f"capturing {key.what} for {key.size} images ran out of memory "
                        f"({_first_line(error)})"
                    )
                    raise self._refuse(key, why) from error
        self._kept[key] = made
        self._meet(key, None)
        _log.info("captured %s for %d images: %.0f MiB", key.what, key.size, made.memory / 2**20)
        return made

    def _refuse(self, key: Key, why: str) -> CaptureError:
        self._meet(key, why)
        assert self.recorder is not None
        self.recorder.release()
        return CaptureError(why)

    def _record(
        self,
        recorder: Recorder,
        key: Key,
        body: Body,
        inputs: Mapping[str, Tensor],
        modules: Sequence[nn.Module],
        first: bool,
    ) -> Capture:
        # Whatever the mode of this call, later ones may have another: tensors of inference mode
        # can't be written to outside it.
        with RECORDING, torch.inference_mode(False), torch.no_grad(), recorder.turn():
            watched = Fingerprint.of(modules)
            buffers = {name: value.clone() for name, value in inputs.items()}
            if first:
                body(**buffers)
            eager = recorder.seconds(lambda: body(**buffers))
            recorder.release()
            held = recorder.held()
            began = time.perf_counter()
            result, replay = recorder.record(lambda: body(**buffers))
            seconds = time.perf_counter() - began
            replay()  # the first one also brings the graph to the device
            replayed = recorder.seconds(replay)
            memory = max(0, recorder.held() - held)
        return Capture(key, buffers, result, replay, watched, memory, seconds, eager, replayed)

    def _replay(self, capture: Capture, inputs: Mapping[str, Tensor]) -> Tensor:
        assert self.recorder is not None
        with self.recorder.turn(), torch.no_grad():
            for name, buffer in capture.inputs.items():
                buffer.copy_(inputs[name], non_blocking=True)
            capture.replay()
            result = capture.result.clone()
        capture.hits += 1
        self._kept.move_to_end(capture.key)
        return result


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _lacks_memory(error: BaseException) -> bool:
    """Whether torch's allocator says so, or the driver or a library, which have no type of error
    for it.
    """
    said = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in said
        or "alloc_failed" in said
    )


def _let_go(error: BaseException | None, outer: BaseException | None) -> None:
    """Free what the frames of an error hold, tensors of a body for example, and of those it came
    from up to the outer one.
    """
    while error is not None and error is not outer:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
