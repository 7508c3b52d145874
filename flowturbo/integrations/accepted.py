"""Which schedulers a plan can take the place of, and why not of others."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

_WITH_FLOW_SIGMAS = tuple(
    getattr(diffusers, name)
    for name in (
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "HeliosScheduler",  # of a single stage
    )
    if hasattr(diffusers, name)  # old versions lack some
)
_EULER = "FlowMatchEulerDiscreteScheduler"
_INSTEAD = f"use {_EULER}.from_config(pipe.scheduler.config)"
_NOISY = "it adds noise in every step, which a plan does not"
_REFUSED = {
    "FlowMatchHeunDiscreteScheduler": f"it steps twice a noise level: {_INSTEAD} for its levels",
    "FlowMatchLCMScheduler": _NOISY,
    "SCMScheduler": "it samples a consistency model, which has no velocity to integrate",
    "FlowMapEulerDiscreteScheduler": "its network predicts a jump between two times, no velocity",
    "LTXEulerAncestralRFScheduler": f"{_NOISY}: {_INSTEAD}",
    "PiflowScheduler": "its network predicts a policy for many substeps, no velocity",
    "HeliosDMDScheduler": _NOISY,
    "SASolverScheduler": _NOISY,
}


def base_of(scheduler: Any) -> type[Any]:
    """The class of diffusers whose noise levels a scheduler has.

    Raises TypeError, saying what to do, for a scheduler that a plan can't take the place of, and
    ValueError for such a configuration of one that it could.
    """
    kind = type(scheduler)
    base: type[Any] | None = next(
        (b for b in kind.__mro__ if b in (FlowMatchEulerDiscreteScheduler, *_WITH_FLOW_SIGMAS)),
        None,
    )
    if base is None:
        why = next((_REFUSED[b.__name__] for b in kind.__mro__ if b.__name__ in _REFUSED), "")
        raise TypeError(
            f"plans take the place of UniPC and DPM++ with flow sigmas, and of {_EULER}, not of "
            f"{kind.__name__}{why and ': '}{why}"
        )
    own = [name for name in ("set_timesteps", "step") if name in vars(scheduler)]
    if own:
        raise TypeError(
            f"plans can't take the place of a scheduler whose {own[0]} was replaced on the "
            "instance: take that off first"
        )
    if kind.step is not base.step:
        raise TypeError(
            f"plans can't take the place of {kind.__name__}: its step is not that of "
            f"{base.__name__}"
        )
    check_configuration(scheduler, base)
    return base


def check_configuration(scheduler: Any, base: type[Any]) -> None:
    """Raise TypeError or ValueError for a configuration that a plan can't take over."""
    config = scheduler.config
    name = type(scheduler).__name__
    stochastic = config.get("stochastic_sampling") and "stochastic_sampling=True"
    if str(config.get("algorithm_type", "")).startswith("sde"):
        stochastic = f"algorithm_type={config['algorithm_type']!r}"
    if stochastic:
        raise ValueError(
            f"a {name} with {stochastic} can't run a plan, which adds no noise: set it to "
            f"{'False' if base is FlowMatchEulerDiscreteScheduler else 'dpmsolver++'} with "
            "from_config first, if the model samples well without"
        )
    if base is FlowMatchEulerDiscreteScheduler:
        return
    if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction":
        raise TypeError(
            f"plans take the place of {name} only with use_flow_sigmas=True and "
            f"prediction_type='flow_prediction', got {config.get('use_flow_sigmas')} and "
            f"{config.get('prediction_type')!r}: this is no flow-matching pipeline"
        )
    if config.get("stages", 1) != 1 or config.get("scheduler_type") == "dmd":
        raise TypeError(
            f"plans take the place of {name} only with stages=1 and without noise between, got "
            f"stages={config.get('stages')}, scheduler_type={config.get('scheduler_type')!r}"
        )
    if config.get("thresholding"):
        raise ValueError(f"a {name} with thresholding=True can't run a plan, which has none")
