"""CUDA graphs of whole runs, kept for replay in a bounded cache.

The cache knows keys, tensors and functions, but no model and no plan. The first run under a key is
eager, so that kernels are compiled and tuned. The second run is captured. From then on the graph
is replayed: inputs are copied into its buffers, and the result is copied out.
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
"""A run: inputs by name -> result. The work must not depend on the values of the inputs."""


class Key(NamedTuple):
    """What a capture is stored under.

    what: everything that determines the work, except the number of images.
    size: the number of images.
    """

    what: Hashable
    size: int


class CaptureError(RuntimeError):
    """A run could not be captured. It can still be executed eagerly."""


@dataclass
class Capture:
    """A captured run and what it cost.

    memory: bytes of device memory that this capture added to the graph pool.
    seconds: time to capture. eager_seconds, replay_seconds: one eager run, one replay.
    precaptured: captured by `precapture` rather than on the second run.
    hits: number of replays.

    After `give_up` the figures stay valid, but the tensors and the graph are released, even if
    someone still holds the Capture.
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
        """Release the graph and its tensors."""
        self.inputs, self.result = {}, torch.empty(0, dtype=torch.float32, device="cpu")
        self.replay, self.watched = _given_up, Fingerprint()


def _given_up() -> None:
    raise RuntimeError("this capture was given up, and can't be replayed")


@dataclass
class Fingerprint:
    """The memory addresses of the weights of some modules.

    It also keeps those tensors alive, so that a replay never reads memory that was freed.
    """

    addresses: list[Any] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> Fingerprint:
        """The fingerprint of the modules as they are now."""
        fingerprint = cls(addresses(modules))
        for module in modules:
            fingerprint.kept += [
                module,
                *(t.detach() for t in (*module.parameters(), *module.buffers())),
            ]
        return fingerprint

    def fits(self, modules: Sequence[nn.Module]) -> bool:
        """Whether the weights of the modules are still where they were."""
        return self.addresses == addresses(modules)


def addresses(modules: Sequence[nn.Module]) -> list[Any]:
    """Ids of all submodules, with their training flags and the addresses of their tensors.

    The list changes when a weight is moved, cast or replaced, when a submodule is exchanged, when a
    module switches between training and evaluation, and when what its `made_of` lists does.
    """
    ids: list[Any] = []
    stack = list(modules)
    while stack:
        module = stack.pop()
        ids += [id(module), module.training, *getattr(module, "made_of", list)()]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            ids.append(0 if tensor is None else tensor.data_ptr())
        stack += [child for child in module._modules.values() if child is not None]
    return ids


class Captures:
    """The captured runs of one model: a cache of at most `limit` captures.

    The least recently used capture is evicted first; those of `precapture` are evicted last.
    limit: may be changed at any time.
    recorder: None: CUDA graphs on CUDA devices, and no captures elsewhere.
    """

    def __init__(self, limit: int = 8, recorder: Recorder | None = None) -> None:
        self.limit, self.recorder = limit, recorder
        self._lock = threading.RLock()
        self._kept: OrderedDict[Key, Capture] = OrderedDict()
        # Keys that were run before -> why they can't be captured, or None.
        self._met: OrderedDict[Key, str | None] = OrderedDict()

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
        """The captures in the cache, the least recently used first."""
        with self._lock:
            return list(self._kept.values())

    def refused(self) -> dict[Key, str]:
        """The runs that could not be captured, with the reason."""
        with self._lock:
            return {key: why for key, why in self._met.items() if why is not None}

    def tell(self, key: Key, why: str | None) -> None:
        """Why what stands under this key is not captured; None: nothing is in its way."""
        with self._lock:
            if self._met.get(key) != why:
                self._meet(key, why)

    def __str__(self) -> str:
        """One line for each capture and for each run that could not be captured."""
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
        """Release all captures and their memory."""
        with self._lock:
            self._drop(self._kept.values())
            self._met.clear()
            if self.recorder is not None:
                self.recorder.release()

    def size_for(self, what: Hashable, count: int) -> int | None:
        """The smallest precaptured size that holds `count` images, or None."""
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
        """The result of body(**inputs), by replay if it is captured.

        modules: all modules whose weights the body reads.
        """
        with self._lock:
            for last_try in (False, True):
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
                if capture.watched.fits(modules):  # checked while the device is busy
                    return result
                _log.info("weights have moved: capturing again")
                self._drop(c for c in self._kept.values() if not c.watched.fits(modules))
                if last_try:  # as with offloading, or casts layer by layer
                    self._meet(key, "its weights move in every run")
        return body(**inputs)

    def precapture(
        self, key: Key, body: Body, inputs: Mapping[str, Tensor], modules: Sequence[nn.Module]
    ) -> Capture:
        """Capture now, and evict this capture only after those of `run`.

        Raises CaptureError if the run can't be captured, or if `limit` runs are precaptured
        already.
        """
        with self._lock:
            capture = self._kept.get(key)
            if capture is None or not capture.watched.fits(modules):
                if sum(c.precaptured for c in self._kept.values() if c.key != key) >= self.limit:
                    raise CaptureError(
                        f"there are {self.limit} captures made ahead already: raise "
                        "model.captures.limit for more"
                    )
                self._drop([capture] if capture is not None else [])
                capture = self._capture(key, body, inputs, modules, first=True)
            capture.precaptured = True
            return capture

    def _meet(self, key: Key, why: str | None) -> None:
        self._met[key] = why
        self._met.move_to_end(key)
        while len(self._met) > 64 + 4 * self.limit:
            self._met.popitem(last=False)

    def _drop(self, captures: Iterable[Capture]) -> None:
        """Evict captures, after waiting for replays that are still running.

        Their memory may be reused at once.
        """
        evicted = list(captures)
        if evicted and self.recorder is not None:
            self.recorder.settle()
        for capture in evicted:
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
        """Capture a run. first: run it once before, so that it compiles and tunes its kernels."""
        device = next(iter(inputs.values())).device
        if self.recorder is None or getattr(self.recorder, "device", device) != device:
            # The model has moved to another device.
            self._drop(self._kept.values())
            self.recorder = CudaRecorder(device)
        while len(self._kept) >= self.limit:
            # min returns the first of equals, which is the least recently used.
            self._drop([min(self._kept.values(), key=lambda c: c.precaptured)])
        outer = sys.exc_info()[1]  # an error that the caller is handling
        for last_try in (False, True):
            try:
                capture = self._record(self.recorder, key, body, inputs, modules, first)
                break
            except Exception as error:  # of the body, a compiler or the driver
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
        self._kept[key] = capture
        self._meet(key, None)
        _log.info("captured %s for %d images: %.0f MiB", key.what, key.size, capture.memory / 2**20)
        return capture

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
        # Later calls may run outside inference mode, where inference tensors can't be written to.
        with RECORDING, torch.inference_mode(False), torch.no_grad(), recorder.turn():
            watched = Fingerprint.of(modules)
            buffers = {name: value.clone() for name, value in inputs.items()}
            if first:
                body(**buffers)
            eager_seconds = recorder.seconds(lambda: body(**buffers))
            recorder.release()
            before = recorder.held()
            start = time.perf_counter()
            result, replay = recorder.record(lambda: body(**buffers))
            seconds = time.perf_counter() - start
            replay()  # the first replay also uploads the graph
            replay_seconds = recorder.seconds(replay)
            memory = max(0, recorder.held() - before)
        return Capture(
            key, buffers, result, replay, watched, memory, seconds, eager_seconds, replay_seconds
        )

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
    """Whether an error means that memory ran out.

    torch's allocator has a type of error for it; the driver and the libraries only have words.
    """
    message = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in message
        or "alloc_failed" in message
    )


def _let_go(error: BaseException | None, outer: BaseException | None) -> None:
    """Free the tensors that the frames of an error hold.

    The same for the errors that it was raised from, up to `outer`.
    """
    while error is not None and error is not outer:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
