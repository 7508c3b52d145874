"""Counts a pipeline's predictor calls, and times them on the host."""

from __future__ import annotations

import threading
import time
from typing import Any


class Meter:
    """Predictor calls of all threads.

    calls: of the predictor. timed, seconds: those of them that followed another in the same run,
        and the time since the end of that one's step.
    """

    def __init__(self) -> None:
        self.calls, self.timed, self.seconds = 0, 0, 0.0
        self._lock, self._last = threading.Lock(), threading.local()

    def begin(self) -> None:
        """A run begins."""
        self._last.end = None

    def called(self, until: float) -> None:
        """The output of a predictor call has arrived; `until`: when, by time.perf_counter."""
        last = getattr(self._last, "end", None)
        with self._lock:
            self.calls += 1
            if last is not None:
                self.timed += 1
                self.seconds += until - last
        self._last.end = time.perf_counter()

    def __deepcopy__(self, memo: Any) -> Meter:
        return Meter()

    def __reduce__(self) -> Any:
        return Meter, ()
