"""A recorder of runs for tests without CUDA graphs, and a small model that captures with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tiny import CONFIG, tiny_model
from torch import Tensor

import flowturbo as ft
from flowturbo.models.sit import SiTConfig

LABELS = [1, 8, 3]


class Fake:
    """A recorder as hostile as a GPU: recording fills no buffer, and a replay destroys the results
    of all other captures.
    """

    def __init__(self, failures: list[BaseException] | None = None) -> None:
        self.failures = failures or []
        self.recorded = self.replayed = self.released = self.settled = 0
        self.inside = threading.Lock()
        self.buffers: list[Tensor] = []

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        if self.failures:
            raise self.failures.pop(0)
        self.recorded += 1
        result = run().contiguous()
        result.fill_(77)
        self.buffers.append(result)

        def replay() -> None:
            assert self.inside.locked(), "a replay outside its turn"
            self.replayed += 1
            done = run()
            for buffer in self.buffers:
                buffer.fill_(77)
            result.copy_(done)

        return result, replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert self.inside.acquire(blocking=False), "two turns at once"
        try:
            yield
        finally:
            self.inside.release()

    def settle(self) -> None:
        self.settled += 1

    def seconds(self, run: Callable[[], object]) -> float:
        run()
        return 0.25

    def held(self) -> int:
        return self.recorded << 20

    def release(self) -> None:
        self.released += 1


def captured_model(limit: int = 8, config: SiTConfig = CONFIG) -> tuple[ft.FlowModel, Fake]:
    model, recorder = tiny_model(config), Fake()
    model.captures.limit, model.captures.recorder = limit, recorder
    return model, recorder


def plain(*args: object, **options: object) -> Tensor:
    return ft.sample(tiny_model(), *args, **options)
