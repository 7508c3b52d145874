"""CUDA graphs of whole runs, kept for replay in a bounded cache. It knows keys, tensors and functions; no model, no plan.

A run under a new key is executed as it is, which compiles and measures whatever it needs; the second one under that key is
captured, and replayed from then on: inputs are copied into buffers of the graph, the result is copied out.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

Body = Callable[..., Tensor]
"""A run: inputs by name -> its result. It must do the same work whatever the inputs hold."""


class Key(NamedTuple):
    """What a capture is kept under. what: everything that decides the work but the number of images, which is `size`."""

    what: Hashable
    size: int


class CaptureError(RuntimeError):
    """A run could not be captured: it can still be executed as it is."""


class Recorder(Protocol):
    """What can record the work of a run on a device."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """Its result's buffer, and what does the work again. The buffer is filled by that, and not by the recording."""
        ...

    def turn(self) -> AbstractContextManager[object]:
        """Work queued inside waits for the work queued in earlier turns, on whatever stream and by whatever thread."""
        ...

    def seconds(self, run: Callable[[], object]) -> float:
        """How long it takes on the device, from an idle one to an idle one."""
        ...

    def held(self) -> int:
        """Bytes of the device's memory that are held now."""
        ...

    def release(self) -> None:
        """Give back memory that nothing uses."""
        ...


class CudaRecorder:
    """CUDA graphs on one device. All captures share one pool, since replays take turns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._done: torch.cuda.Event | None = None

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        graph = torch.cuda.CUDAGraph()
        # A stream of its own each time: one whose capture failed may stay invalid. Other threads may allocate meanwhile.
        stream = torch.cuda.Stream(self.device)
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            result = run()
        return result, graph.replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done = torch.cuda.Event()
                self._done.record(stream)

    def seconds(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        run()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def held(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def release(self) -> None:
        torch.cuda.empty_cache()


@dataclass
class Capture:
    """A captured run and what it cost. memory: bytes that the device's allocator took for it, beyond those of earlier captures.

    seconds: to capture; eager, replay: of one run executed as it is, and of one replay. ahead: whether it was asked for by name.
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
    ahead: bool = False
    hits: int = 0


@dataclass
class Fingerprint:
    """Where the weights of modules lie. It holds the memory it names, so that a replay never reads what was given back."""

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
    """The modules inside these and where their tensors lie: it changes when a weight is moved, cast or replaced, a module is put in
    another's place, or modules learn or forget."""
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
    """The captured runs of one model: at most `limit`, the least recently used given up first, those made ahead last.

    limit: may be changed at any time. recorder: None: CUDA graphs on CUDA devices, and elsewhere nothing is captured.
    """

    def __init__(self, limit: int = 8, recorder: Recorder | None = None) -> None:
        self.limit, self.recorder = limit, recorder
        self._lock = threading.RLock()
        self._kept: OrderedDict[Key, Capture] = OrderedDict()
        self._met: OrderedDict[Key, str | None] = OrderedDict()  # keys run before -> why they can't be captured

    def __reduce__(self) -> tuple[type[Captures], tuple[int]]:
        return Captures, (self.limit,)  # a copy of a model has other weights

    def possible(self, device: torch.device) -> bool:
        """Whether runs on that device can be captured now."""
        if self.limit < 1 or torch.is_autocast_enabled(device.type):
            return False
        if self.recorder is not None:
            return True
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def report(self) -> list[Capture]:
        """What is captured now, the least recently used first."""
        with self._lock:
            return list(self._kept.values())

    def refused(self) -> dict[Key, str]:
        """Runs that could not be captured, and why."""
        with self._lock:
            return {key: why for key, why in self._met.items() if why is not None}

    def clear(self) -> None:
        """Give up all captures and their memory."""
        with self._lock:
            self._kept.clear()
            self._met.clear()
            if self.recorder is not None:
                self.recorder.release()

    def size_for(self, what: Hashable, count: int) -> int | None:
        """The smallest size captured ahead that holds `count` images."""
        with self._lock:
            return min((k.size for k, c in self._kept.items() if c.ahead and k.what == what and k.size >= count), default=None)

    def run(self, key: Key, body: Body, inputs: Mapping[str, Tensor], modules: Sequence[nn.Module]) -> Tensor:
        """The body's result on these inputs, by replay where it is captured. modules: all whose weights the body reads."""
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
                self._kept = OrderedDict((k, c) for k, c in self._kept.items() if c.watched.fits(modules))
                del capture, result
        return body(**inputs)

    def ahead(self, key: Key, body: Body, inputs: Mapping[str, Tensor], modules: Sequence[nn.Module]) -> Capture:
        """Capture now, and keep it before those that came by themselves. CaptureError where it can't be."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or not kept.watched.fits(modules):
                if sum(c.ahead for c in self._kept.values() if c.key != key) >= self.limit:
                    raise CaptureError(f"there are {self.limit} captures made ahead already: raise model.captures.limit for more")
                body(**inputs)  # compiles and measures what it needs
                self._kept.pop(key, None)
                kept = self._capture(key, body, inputs, modules)
            kept.ahead = True
            return kept

    def _meet(self, key: Key, why: str | None) -> None:
        self._met[key] = why
        self._met.move_to_end(key)
        while len(self._met) > 64 + 4 * self.limit:
            self._met.popitem(last=False)

    def _capture(self, key: Key, body: Body, inputs: Mapping[str, Tensor], modules: Sequence[nn.Module]) -> Capture:
        if self.recorder is None:
            self.recorder = CudaRecorder(next(iter(inputs.values())).device)
        while len(self._kept) >= self.limit:
            self._kept.pop(min(self._kept.values(), key=lambda c: c.ahead).key)  # the first of the smallest: the least recent
        for last_try in (False, True):
            try:
                made = self._record(self.recorder, key, body, inputs, modules)
                break
            except torch.OutOfMemoryError as error:
                self._kept.clear()
                self.recorder.release()
                if last_try:
                    what = f"capturing {key.what} for {key.size} images ran out of memory ({_first_line(error)})"
                    raise self._refuse(key, what) from error
            except Exception as error:  # whatever a body, a compiler or a driver may raise
                raise self._refuse(key, f"capturing {key.what} failed ({type(error).__name__}: {_first_line(error)})") from error
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
        self, recorder: Recorder, key: Key, body: Body, inputs: Mapping[str, Tensor], modules: Sequence[nn.Module]
    ) -> Capture:
        watched = Fingerprint.of(modules)
        buffers = {name: value.clone() for name, value in inputs.items()}
        with recorder.turn():
            eager = recorder.seconds(lambda: body(**buffers))
            recorder.release()
            held = recorder.held()
            began = time.perf_counter()
            result, replay = recorder.record(lambda: body(**buffers))
            seconds = time.perf_counter() - began
            replay()  # the first one also brings the graph to the device
            replayed = recorder.seconds(replay)
        return Capture(key, buffers, result, replay, watched, max(0, recorder.held() - held), seconds, eager, replayed)

    def _replay(self, capture: Capture, inputs: Mapping[str, Tensor]) -> Tensor:
        assert self.recorder is not None
        with self.recorder.turn():
            for name, buffer in capture.inputs.items():
                buffer.copy_(inputs[name], non_blocking=True)
            capture.replay()
            result = capture.result.clone()
        capture.hits += 1
        self._kept.move_to_end(capture.key)
        return result


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
