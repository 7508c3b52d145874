"""Conversions to e4m3 in Triton's interpreter as a GPU makes them.

The interpreter's own lose the carry of a mantissa that rounds up to the next power of two (1.99
becomes 1), cut off what lies between two numbers below 2^-6, and turn NaN into 384.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float32: to the nearest, ties to even; NaN, and what rounds to more than 448, to NaN."""
    language = pytest.importorskip("triton.language")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def converted(values: Any, given: Any, wanted: Any, rounding: Any) -> Any:
        if (given, wanted) != (language.float32, language.float8e4nv):
            return convert(values, given, wanted, rounding)
        e4m3 = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
        return e4m3.view(torch.uint8).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", converted)
