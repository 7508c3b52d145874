"""Kernels that several threads compile for the first time."""

from __future__ import annotations

import pytest

from flowturbo_kernels import _triton


def test_a_kernel_that_another_thread_compiles_meanwhile(monkeypatch):
    """It replaces the kernels that this one calls, at any moment."""
    pytest.importorskip("triton")

    class Interrupted(type):
        """What stands for Kernel: another thread runs whenever it is asked about."""

        def __instancecheck__(cls, value: object) -> bool:
            if type(value) is not kernel_type:
                return False
            globals()[value.function.__name__] = value.jit
            return True

    kernel_type = _triton.Kernel
    called = kernel_type(_called)
    monkeypatch.setitem(globals(), "_called", called)
    monkeypatch.setattr(_triton, "Kernel", Interrupted("Kernel", (), {}))
    kernel_type(_calls).jit  # noqa: B018
    assert globals()["_called"] is called.jit


def _called() -> None: ...


def _calls() -> None:
    _called()
