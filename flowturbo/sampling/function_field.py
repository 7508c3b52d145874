"""A callable as a velocity field: how it is called, and what it may return."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models.flow_model import VelocityFunction
from ..solver.steps import Field

Convention = Literal["time", "sigma"]
"""What a callable is given and returns: data - noise at the time t, 0 for noise; or noise - data at
the noise level sigma = 1 - t, as in diffusers and ComfyUI.
"""
_CONVENTIONS = ("time", "sigma")

_TIMES = {"t", "time", "times", "timestep", "timesteps", "sigma", "sigmas"}
_STATES = {"x", "xt", "x_t", "y", "z", "zt", "z_t", "sample", "latents", "hidden_states", "image"}
"""Names of arguments that tell what they are."""

_TURNED = (
    "model takes its arguments as (t, x), but it is called as model(x, t): pass "
    "lambda x, t, **cond: model(t, x, **cond)"
)
_BATCH_OF_T = (
    "model needs t of shape (N,), one number for each row of x, but t is one number for all: pass "
    "lambda x, t, **cond: model(x, t.expand(len(x)), **cond)"
)
_TURNED_BATCH = (
    "model takes its arguments as (t, x), with t of shape (N,), but it is called as model(x, t), "
    "with one number for all: pass lambda x, t, **cond: model(t.expand(len(x)), x, **cond)"
)
# What a call with the wrong arguments may end in.
_MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
             ValueError)  # fmt: skip


class FunctionField(Field):
    """A callable v(x, t, **cond) as a field, without guidance and refiner.

    Its first call is checked: where the arguments don't suit the callable, but other ones do, the
    error says so.
    """

    def __init__(
        self, function: VelocityFunction, cond: dict[str, Any], convention: Convention = "time"
    ) -> None:
        self.function, self.cond, self.convention = function, cond, convention
        self._works = False

    def predict(self, x: Tensor, t: float) -> Tensor:
        level = t if self.convention == "time" else 1 - t
        out = self._call(x, torch.tensor(level, dtype=x.dtype, device=x.device))
        # Always another tensor: a callable may return the same buffer at every call, as one that
        # replays a CUDA graph does, and steps read velocities of earlier calls.
        return out.clone() if self.convention == "time" else -out

    def refine(self, x: Tensor, t: float, v: Tensor) -> Tensor:
        raise ValueError("this plan has refiner steps, but a plain function has no refiner")

    def _call(self, x: Tensor, level: Tensor) -> Tensor:
        """What the callable returns, checked."""
        version = None if x.is_inference() else x._version
        try:
            out = self.function(x, level, **self.cond)
        except torch.OutOfMemoryError:
            raise
        except _MISTAKES as error:
            if not self._works and (why := self._explained(x, level)):
                raise TypeError(why) from error
            raise
        if (fault := _fault(out, x)) is not None:
            why = None if self._works else self._explained(x, level)
            raise TypeError(why) if why else fault
        if version is not None and x._version != version:
            raise ValueError(
                "model changed its input x in place, which the step still needs: pass "
                "lambda x, t, **cond: model(x.clone(), t, **cond)"
            )
        self._works = True
        return out

    def _explained(self, x: Tensor, level: Tensor) -> str | None:
        """Which other arguments the callable would take, if any."""
        levels = level.repeat(len(x))
        for arguments, sentence in (
            ((x, levels), _BATCH_OF_T),
            ((level, x), _TURNED),
            ((levels, x), _TURNED_BATCH),
        ):
            try:
                out = self.function(*arguments, **self.cond)
            except Exception:
                continue
            if _fault(out, x) is None:
                return sentence
        return None


def check_function(function: Any, convention: str) -> None:
    """Refuse what can be told without a call.

    Raises TypeError for what is not callable, and for the order (t, x); ValueError for a convention
    that is unknown, or is not that of the arguments' names.
    """
    if not callable(function):
        raise TypeError(
            "model must be a FlowModel or a callable v(x, t, **cond), got "
            f"{type(function).__name__}"
        )
    if convention not in _CONVENTIONS:
        raise ValueError(f"convention must be 'time' or 'sigma', got {convention!r}")
    first, second = _two_names(function)
    if first in _TIMES and second in _STATES:
        raise TypeError(_TURNED)
    if convention == "time" and second in ("sigma", "sigmas"):
        raise ValueError(
            f"model's second argument is {second!r}, but with convention='time' it is the time t, "
            "0 for noise: give convention='sigma' if the model returns noise - data, or rename it"
        )


def _two_names(function: Any) -> tuple[str, str]:
    """The names of the first two positional arguments; "" for one that has none."""
    try:
        target = function.forward if isinstance(function, nn.Module) else function
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # of some functions written in C
        return "", ""
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    first, second, *_ = *positional, "", ""
    return first, second


def _fault(out: Any, x: Tensor) -> Exception | None:
    """Why this is no velocity for x, as an exception, or None."""
    if not isinstance(out, Tensor):
        return TypeError(f"model must return the velocity as a tensor, got {_described(out)}")
    if out.shape != x.shape:
        return ValueError(
            f"model must return the velocity in the shape of x, {tuple(x.shape)}, got "
            f"{_misshapen(out, x)}"
        )
    if not out.is_floating_point():
        return TypeError(f"model must return the velocity as floating point, got {out.dtype}")
    if out.device != x.device:
        return ValueError(
            f"model must return the velocity on the device of x, {x.device}, got {out.device}"
        )
    return None


def _described(out: Any) -> str:
    """What was returned in place of a tensor, and what to return of it."""
    kind = type(out).__name__
    if isinstance(getattr(out, "sample", None), Tensor):
        return f"{kind}: pass lambda x, t, **cond: model(x, t, **cond).sample"
    if isinstance(out, Mapping):
        return f"{kind} of {', '.join(map(repr, out))}: return the entry that is the velocity"
    if isinstance(out, list | tuple) and out:
        return f"{kind} of {len(out)}: pass lambda x, t, **cond: model(x, t, **cond)[0]"
    return kind


def _misshapen(out: Tensor, x: Tensor) -> str:
    """The shape, and what such a shape may mean."""
    if out.ndim == 0:
        return "a single number: a loss is no velocity, pass the network itself"
    if x.ndim > 1 and out.shape == (len(x), 2 * x.shape[1], *x.shape[2:]):
        return f"{tuple(out.shape)}: if half of the channels are a variance, return the others"
    return f"{tuple(out.shape)}"
