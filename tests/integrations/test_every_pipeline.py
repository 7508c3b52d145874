"""Every flow-matching pipeline of the installed diffusers: exact with a plan, or refused.

Small random components. E plans equal the stock scheduler; A, H and P steps equal their formulas in
float64; a restored pipeline is what it was.
"""

from __future__ import annotations

import pipeline_table
import pipeline_walk
import pytest
import zoo
from pipelines import diffusers

import flowturbo as ft
from flowturbo.integrations.tested_pipelines import TESTED
from flowturbo.solver import steps

NAMES = [name for name in zoo.builders() if hasattr(diffusers, name.partition(":")[0])]
FEW = [
    name
    for name in (
        "StableDiffusion3Pipeline",
        "FluxInpaintPipeline",
        "Flux2KleinPipeline",  # its shift depends on the number of steps
        "CogView4Pipeline",  # it gives timesteps beside sigmas
        "Ideogram4Pipeline",  # it has guidance for each step
        "Kandinsky5T2VPipeline",  # it copies what a step returns into a tensor of its own
        "WanPipeline",  # its solver is UniPC
        "MochiPipeline",  # its noise levels are inverted
        "LTX2Pipeline",  # it has two schedulers, and divides by the noise level
        "HunyuanImagePipeline: distilled",  # its network predicts mean velocities
        "FluxModularPipeline",
        "SanaSprintPipeline",  # refused
    )
    if name in NAMES
]
"""Some of each kind; all of them take minutes."""


def _walked(name: str) -> None:
    outcome = pipeline_walk.outcome(name)
    assert not outcome.faults
    assert all(len(why.split()) > 5 for why in outcome.refused.values())  # a sentence


@pytest.mark.parametrize("name", FEW)
def test_some_pipelines_are_exact_or_refused(name):
    _walked(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(FEW)))
def test_each_pipeline_is_exact_or_refused(name):
    _walked(name)


def test_no_pipeline_is_left_out():
    found = set(zoo.flow_pipelines())
    assert not found - set(zoo.builders()) - set(zoo.UNTRIED)
    assert not set(zoo.UNTRIED) & set(zoo.builders())


def _outcomes() -> list[pipeline_walk.Outcome]:
    if f"diffusers {diffusers.__version__}" not in pipeline_table.PAGE.read_text():
        pytest.skip("the page is about another version of diffusers")
    return [pipeline_walk.outcome(name) for name in NAMES]


@pytest.mark.slow
def test_the_table_on_the_page_is_what_came_out():
    assert pipeline_table.table(_outcomes()) == pipeline_table.written()


@pytest.mark.slow
def test_the_library_warns_of_other_pipelines_than_those_that_were_tested():
    assert pipeline_table.tested(_outcomes()) == TESTED


WRONG = {
    "the steps are a thousandth too long": "AAAA: ",
    "the noise levels are others": "other noise levels",
    "nothing is accelerated": "AAAA: ",
    "nothing is restored": "not restored",
}
"""What is done wrong, and the fault that the walk must find."""


@pytest.mark.parametrize("wrong", WRONG)
def test_the_walk_finds_what_is_wrong(wrong, monkeypatch):
    if wrong.startswith("the steps"):
        right = steps.adams_bashforth_weights
        longer = lambda *given: [1.001 * weight for weight in right(*given)]  # noqa: E731
        monkeypatch.setattr(steps, "adams_bashforth_weights", longer)
    elif wrong.startswith("the noise levels"):
        accelerate = ft.accelerate
        corrected = lambda pipe, plan: accelerate(pipe, plan, grid="corrected")  # noqa: E731
        monkeypatch.setattr(ft, "accelerate", corrected)
    else:
        monkeypatch.setattr(ft, "restore", lambda pipe: pipe)
        if wrong == "nothing is accelerated":
            monkeypatch.setattr(ft, "accelerate", lambda pipe, plan: pipe)
    faults = pipeline_walk.outcome.__wrapped__("StableDiffusion3Pipeline").faults
    assert any(WRONG[wrong] in fault for fault in faults), faults
