"""ChronoEdit's temporal reasoning cuts frames out of the latents in mid-run, and edits the
scheduler's memory: a plan goes on without the velocities before the cut.
"""

from __future__ import annotations

import pipeline_walk as walk
import pytest
import zoo_wan
from pipelines import diffusers

import flowturbo as ft

if not hasattr(diffusers, "ChronoEditPipeline"):
    pytest.skip("diffusers is too old", allow_module_level=True)


def _run(letters: str, cut: int) -> walk.Run:
    """The run of a plan whose latents are cut before this call."""
    case = zoo_wan.chrono_edit()
    case.arguments |= {
        "enable_temporal_reasoning": True,
        "num_temporal_reasoning_steps": cut,
        "num_frames": 9,
    }
    with ft.accelerated(case.pipe, letters):
        (run,) = walk.traced(case, 4).runs
    assert [x.shape[2] for x in run.samples] == [3] * cut + [2] * (4 - cut)
    return run


@pytest.mark.parametrize("letters", ["EEEE", "AAAA", "HAE"])
def test_after_the_cut_a_plan_begins_anew(letters):
    run = _run(letters, 2)
    after = walk.Run(run.levels, run.samples[2:], run.velocities[2:], run.returned[2:])
    assert walk.recursion_error(after, letters) <= walk.BOUND
    step = run.levels[0] - next(level for level in run.levels if level < run.levels[0])
    assert walk.error(run.returned[:1], [run.samples[0] + step * run.velocities[0]]) <= walk.BOUND


def test_a_step_of_two_calls_cannot_be_cut():
    with pytest.raises(ValueError, match="plan H1A1E1 is within a step of two calls"):
        _run("HAE", 1)
