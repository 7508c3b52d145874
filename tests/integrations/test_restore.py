"""restore() leaves no trace of accelerate(), and what does not fit changes nothing."""

from __future__ import annotations

from typing import Any

import pipelines
import pytest
from accelerated import refiner_of
from close import assert_close
from pipelines import (
    call,
    diffusers,
    flux,
    sd3,
    sd3_transformer,
    unet,
)

import flowturbo as ft
from flowturbo.integrations.scheduler import PlanScheduler

MAKERS = {"sd3": sd3, "flux": flux}


def test_a_saved_pipeline_loads_as_a_stock_one_and_one_loads_with_the_plan(tmp_path):
    pipe = sd3()
    expected = call(pipe, num_inference_steps=4)
    ft.accelerate(pipe, "H1P3")
    planned = call(pipe)
    pipe.save_pretrained(tmp_path)
    absent = {
        f"{part}{suffix}": None
        for part in ("text_encoder", "tokenizer")
        for suffix in ("", "_2", "_3")
    }
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path, **absent)
    assert type(again.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    again.set_progress_bar_config(disable=True)
    assert_close(call(again, num_inference_steps=4), expected, 1e-6)
    ours = PlanScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    third = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path, scheduler=ours, **absent)
    third.set_progress_bar_config(disable=True)
    assert_close(call(third), planned, 1e-6)


def attributes(pipe: Any) -> dict[str, Any]:
    """Of the pipeline and of every module in it, without what was there before."""
    everything = {
        "pipe": {k: v for k, v in vars(pipe).items() if not k.startswith("_callback")},
        "config": dict(pipe.config),
    }
    for name, module in pipe.transformer.named_modules():
        everything[name] = {k: v for k, v in vars(module).items() if "hook" not in k}
        everything[name, "hooks"] = {
            k: dict(v) for k, v in vars(module).items() if "hook" in k and isinstance(v, dict)
        }
    return everything


@pytest.mark.parametrize("kind", MAKERS)
def test_restore_leaves_no_trace(kind):
    pipe, other = MAKERS[kind](), MAKERS[kind]()
    before = call(pipe, num_inference_steps=3)
    classes = [
        type(pipe),
        type(pipe.transformer),
        type(pipe.scheduler),
        *map(type, pipe.transformer.modules()),
    ]
    of_classes = [dict(vars(one)) for one in classes]
    scheduler, traces = pipe.scheduler, attributes(pipe)
    ft.accelerate(pipe, "H1P1R1", refiner_of(pipe), graph=True)
    assert [dict(vars(one)) for one in classes] == of_classes
    call(pipe)
    assert call(other, num_inference_steps=3).equal(before)
    assert attributes(pipe) != traces
    assert ft.restore(pipe) is pipe
    assert pipe.scheduler is scheduler
    after = attributes(pipe)
    assert after.keys() == traces.keys()
    of_calls = (
        "_guidance",
        "_joint",
        "_interrupt",
        "_num_timesteps",
        "_skip",
        "_clip",
        "_current",
    )  # what calling leaves behind
    for name, values in traces.items():
        kept = after[name]
        assert values.keys() <= kept.keys(), name
        changed = {
            key for key, value in kept.items() if key not in values or values[key] is not value
        }
        assert not {
            key
            for key in changed
            if not str(key).startswith(of_calls) and values.get(key) != kept[key]
        }, name
    assert call(pipe, num_inference_steps=3).equal(before)


def test_accelerating_twice_and_restoring_nothing_are_refused():
    pipe = sd3()
    for undo in (ft.restore, ft.summary):
        with pytest.raises(ValueError, match="not accelerated"):
            undo(pipe)
    ft.accelerate(pipe, "H1P1")
    with pytest.raises(ValueError, match="accelerated by plan H1P1 already: restore it first"):
        ft.accelerate(pipe, "H1P2")
    ft.restore(pipe)
    with pytest.raises(RuntimeError, match="inside"), ft.accelerated(pipe, "H1P2"):
        raise RuntimeError("inside")
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler


def test_what_does_not_fit_is_refused_and_leaves_the_pipeline_as_it_was():
    pipe = sd3()
    traces = attributes(pipe)
    other = flux()
    for arguments, kind, message in (
        (("H1R1",), ValueError, "has refiner steps: give a refiner"),
        (("H1P1", refiner_of(pipe)), ValueError, "has no refiner steps"),
        (("H1R1", refiner_of(other)), TypeError, "must be a SD3Transformer2DModel"),
        (("H1R1", sd3_transformer()), ValueError, "must read 8 channels"),
        (("H1Q1",), ValueError, "Q"),
    ):
        with pytest.raises(kind, match=message):
            ft.accelerate(pipe, *arguments)
        assert attributes(pipe) == traces
    with pytest.raises(TypeError, match="with a scheduler, got int"):
        ft.accelerate(3, "H1")
    strange = diffusers.StableDiffusionPipeline(
        vae=pipelines.vae(), text_encoder=None, tokenizer=None, unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with pytest.raises(TypeError, match="FlowMatchEulerDiscreteScheduler, not of DDIMScheduler"):
        ft.accelerate(strange, "H1")
    strange.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TypeError, match="know the transformers"):
        ft.accelerate(strange, "H1", graph=True)
