"""What accelerate does to a pipeline as a whole: its count of steps, its class, its copies, and
pipelines that are refused.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from close import assert_close, relative_error
from pipelines import SIZE, call, diffusers, embeds, flux, negative, sd3, sd3_transformer

import flowturbo as ft
from flowturbo.integrations.known_pipelines import REFUSED


def counted(pipe: Any) -> list[int]:
    """Grows by one at each call of the transformer."""
    calls: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_windows_over_the_steps_are_over_the_plans_calls():
    """SD3.5's skip-layer guidance is on from 1 % to 20 % of the requested steps."""
    pipe = sd3(transformer=sd3_transformer(num_layers=2))
    skipped: list[bool] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, options: skipped.append(options.get("skip_layers") is not None),
        with_kwargs=True,
    )

    def made(**options: Any) -> torch.Tensor:
        skipped.clear()
        return call(pipe, skip_guidance_layers=[1], guidance_scale=4.5, **options)

    stock = made(num_inference_steps=10)
    assert sum(skipped) == 1
    with ft.accelerated(pipe, "E10"):
        assert made(num_inference_steps=10).equal(stock)
        assert made().equal(stock)  # where 28 steps would be asked for
        assert sum(skipped) == 1
    ft.accelerate(pipe, "H1P5")
    made(num_inference_steps=50)
    assert sum(skipped) == 1


def test_the_number_of_steps_by_its_place_means_nothing_either():
    pipe = flux()
    names = list(inspect.signature(pipe.__call__).parameters)
    expected = call(pipe, num_inference_steps=3)
    ft.accelerate(pipe, "E3")
    assert list(inspect.signature(pipe.__call__).parameters) == names
    before = names[: names.index("num_inference_steps")]
    defaults = inspect.signature(pipe.__call__).parameters
    values = {"height": SIZE, "width": SIZE}
    arguments = [values.get(name, defaults[name].default) for name in before]
    options = {k: v for k, v in embeds().items() if k not in before}
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    found = pipe(
        *arguments, 17, **options, guidance_scale=2.5, generator=generator, output_type="latent"
    ).images
    again = call(pipe, num_inference_steps=99, guidance_scale=2.5)
    assert_close(found, again, 1e-6)
    assert_close(call(pipe), expected, 1e-6)


def test_the_class_passes_for_the_pipelines_own_and_is_gone_after():
    pipe = flux()
    own = type(pipe)
    ft.accelerate(pipe, "E2")
    assert isinstance(pipe, own)
    assert type(pipe) == own  # noqa: E721 - as other libraries ask
    assert type(pipe).__name__ == own.__name__
    assert type(pipe).__module__ == own.__module__
    ft.restore(pipe)
    assert type(pipe) is own


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_accelerated_and_restored_by_itself(copied):
    pipe = sd3()
    stock = call(pipe, num_inference_steps=3)
    ft.accelerate(pipe, "H1P2")
    planned = call(pipe)
    other = copied(pipe)
    assert call(other).equal(planned)
    assert other.transformer is not pipe.transformer
    ft.restore(other)
    assert call(other, num_inference_steps=3).equal(stock)
    assert call(pipe).equal(planned)
    ft.restore(pipe)
    assert call(pipe, num_inference_steps=3).equal(stock)


def test_a_pipeline_made_from_one_that_is_accelerated_is_a_stock_one():
    pipe = sd3()
    fresh = sd3("StableDiffusion3Img2ImgPipeline")
    image = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = dict(image=image, strength=0.6)
    expected = call(fresh, num_inference_steps=10, **options)
    ft.accelerate(pipe, "H1P4E1")
    with pytest.warns(UserWarning, match="is a stock one: accelerate it too"):
        derived = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    derived.set_progress_bar_config(disable=True)
    calls = counted(derived)
    assert_close(call(derived, num_inference_steps=10, **options), expected, 1e-6)
    assert len(calls) == 6
    for undo in (ft.restore, ft.summary):
        with pytest.raises(ValueError, match="not accelerated: accelerate it itself"):
            undo(derived)
    calls.clear()
    ft.accelerate(derived, "H1P4E1")
    assert call(derived, **options).isfinite().all()
    assert len(calls) == 5  # of seven, at strength 0.6
    ft.restore(derived)
    again = diffusers.StableDiffusion3Pipeline(**pipe.components)
    assert type(again.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler


def test_two_pipelines_that_share_a_network_count_their_own_calls():
    one = sd3()
    other = sd3(transformer=one.transformer)
    ft.accelerate(one, "E2")
    ft.accelerate(other, "E5")
    call(one)
    call(other)
    call(other)
    assert "2 predictor calls so far" in ft.summary(one)
    assert "10 predictor calls so far" in ft.summary(other)
    ft.restore(one)
    call(other)
    assert "15 predictor calls so far" in ft.summary(other)


def test_a_scheduler_with_unipc_gives_its_levels_and_its_place():
    """As Wan 2.2 and SkyReels are published, here in SD3."""
    stock = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    pipe = sd3()
    pipe.scheduler = stock
    made = call(pipe, num_inference_steps=6)
    told: list[float] = []
    ft.accelerate(pipe, "E6")
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, options: told.append(float(options["timestep"][0])), with_kwargs=True
    )
    euler = call(pipe)
    stock.set_timesteps(6)
    assert told == [float(t) for t in stock.timesteps]
    assert 1e-3 < relative_error(euler, made) < 1
    assert pipe.config["scheduler"] == ("diffusers", "UniPCMultistepScheduler")
    ft.restore(pipe)
    assert pipe.config["scheduler"] == ("diffusers", "UniPCMultistepScheduler")
    assert pipe.scheduler is stock
    assert call(pipe, num_inference_steps=6).equal(made)


def hollow(name: str, **parts: Any) -> Any:
    """An instance without anything: enough to be refused."""
    kind = getattr(diffusers, name)
    pipe = kind.__new__(kind)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe.__dict__ |= {"scheduler": scheduler, "_internal_dict": {}, **parts}
    return pipe


@pytest.mark.parametrize("name", ["LTX2Pipeline", "Cosmos2TextToImagePipeline"])
def test_a_call_at_noise_level_0_is_refused_where_the_pipeline_divides_by_it(name):
    for plan in ("H1P5", "E3H1", "P2"):
        with pytest.raises(ValueError, match=rf"by which {name} divides, got {plan}.* A7"):
            ft.accelerate(hollow(name), plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for plan in ("A7", "H1P4E1", "E5"):
            assert ft.accelerate(hollow(name), plan) is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, why) for name, why in REFUSED.items() if hasattr(diffusers, name)),
        ("LTXConditionPipeline", "each token a time of its own"),
    ],
)
def test_pipelines_that_no_plan_can_run_in(name, message):
    pipe = hollow(name)
    before = dict(vars(pipe))
    with pytest.raises(TypeError, match=rf"plans can't run in {name}: .*{message}"):
        ft.accelerate(pipe, "E4")
    assert vars(pipe) == before
    assert type(pipe) is getattr(diffusers, name)


def test_a_modular_pipeline_without_its_components_is_told_to_load_them():
    kind = getattr(diffusers, "ModularPipeline", None)
    if kind is None:
        pytest.skip("this diffusers has no modular pipelines")
    pipe = kind.__new__(kind)
    pipe.__dict__["scheduler"] = None
    with pytest.raises(TypeError, match="got ModularPipeline: load its components first"):
        ft.accelerate(pipe, "A4")


@pytest.mark.parametrize("flag", ["use_meanflow", "flow_map"])
def test_mean_velocities_are_taken_one_step_at_a_time(flag):
    class Network:
        config = type("Config", (), {flag: True})

    pipe = hollow("HunyuanImagePipeline", transformer=Network())
    with pytest.raises(ValueError, match="E steps alone for the mean velocities"):
        ft.accelerate(pipe, "A4")


class StableDiffusion3Unknown(diffusers.StableDiffusion3Pipeline):
    """A class that no table holds."""


def test_unknown_pipelines_are_rehearsed_and_said_to_be_untested():
    pipe = sd3()
    pipe.__class__ = StableDiffusion3Unknown
    stock = call(pipe, num_inference_steps=4)
    with pytest.warns(UserWarning, match="untested in StableDiffusion3Unknown: compare .* E28"):
        ft.accelerate(pipe, "E4")
    assert call(pipe).equal(stock)
    ft.restore(pipe)
    assert type(pipe) is StableDiffusion3Unknown

    class Blind(diffusers.FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps: int, *args: Any, **options: Any) -> None:
            super().set_timesteps(num_inference_steps, *args, **options)
            self.sigmas = self.sigmas[:-1]

    pipe.scheduler = Blind()
    with pytest.raises(TypeError, match="plans can't run in StableDiffusion3Unknown"):
        ft.accelerate(pipe, "E4")
    assert type(pipe) is StableDiffusion3Unknown


def test_guidance_and_negative_prompts_are_the_pipelines_own():
    pipe = sd3()
    strong = call(pipe, num_inference_steps=4, guidance_scale=6.0)
    with ft.accelerated(pipe, "E4"):
        assert call(pipe, guidance_scale=6.0).equal(strong)
    assert negative()


def test_a_scheduler_that_the_user_puts_in_place_is_the_users():
    pipe = sd3()
    stock = call(pipe, num_inference_steps=5)
    ft.accelerate(pipe, "H1P2")
    pipe.scheduler = other = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert call(pipe, num_inference_steps=5).equal(stock)
    with pytest.raises(ValueError, match="accelerated by plan H1P2 already"):
        ft.accelerate(pipe, "E4")
    ft.restore(pipe)
    assert pipe.scheduler is other
    assert type(pipe) is diffusers.StableDiffusion3Pipeline
    assert call(pipe, num_inference_steps=5).equal(stock)


def test_a_pipeline_made_with_anothers_scheduler_can_be_accelerated():
    first = ft.accelerate(sd3(), "H1P2")
    second = sd3()
    expected = call(second, num_inference_steps=4)
    second.scheduler = first.scheduler
    ft.accelerate(second, "E4")
    assert call(second).equal(expected)
    ft.restore(second)
    assert type(second.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert "H1P2" in ft.summary(first)


def test_classes_and_shallow_copies_make_stock_ones():
    pipe = sd3()
    stock = call(pipe, num_inference_steps=3)
    ft.accelerate(pipe, "E5")
    planned = call(pipe)
    made = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=5.0)
    assert type(made) is diffusers.FlowMatchEulerDiscreteScheduler
    assert made.config.shift == 5.0
    other = copy.copy(pipe)
    assert type(other) is diffusers.StableDiffusion3Pipeline
    assert call(other, num_inference_steps=3).equal(stock)
    again = type(pipe)(**pipe.components)
    assert type(again) is diffusers.StableDiffusion3Pipeline
    assert call(pipe).equal(planned)


def test_a_failed_call_keeps_nothing():
    pipe = ft.accelerate(sd3(), "A4")

    def fail(pipe: Any, index: int, timestep: Any, kept: Any) -> Any:
        if index == 2:
            raise RuntimeError("in the callback")
        return kept

    expected = call(pipe)
    with pytest.raises(RuntimeError, match="in the callback"):
        call(pipe, callback_on_step_end=fail)
    assert pipe.scheduler._run is None
    assert call(pipe).equal(expected)


def test_what_holds_for_a_pipeline_holds_for_its_subclasses():
    class Mine(diffusers.LTX2Pipeline):
        pass

    class Token(diffusers.LTXConditionPipeline):
        pass

    for kind, plan, message in ((Mine, "H1P5", "divides"), (Token, "E4", "each token")):
        pipe = kind.__new__(kind)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe.__dict__ |= {"scheduler": scheduler, "_internal_dict": {}}
        with pytest.raises((ValueError, TypeError), match=message):
            ft.accelerate(pipe, plan)
