"""What accelerate puts on a network: beside hooks of other libraries, in copies, on compiled
networks, and beside caches that count calls.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import newer_pipelines
import pytest
import torch
from accelerated import refiner_of
from close import assert_close
from fake_recorder import Fake
from newer_pipelines import KINDS, newer
from pipelines import call, diffusers, flux, sd3

import flowturbo as ft
from flowturbo.integrations.planned_pipeline import MARK
from flowturbo.integrations.transformer import counting_cache


def captures_of(pipe: Any) -> Any:
    return vars(pipe)[MARK].captures


@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_every_kind_are_captured(kind):
    pipe = newer(kind)
    shape = {"zimage": (4, 16, 16), "qwen": (4, 16, 16), "wan": (4, 3, 16, 16)}.get(
        kind.removesuffix("22"), (16, 8, 8)
    )
    noises = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with ft.accelerated(pipe, "H1P2"):
        expected = [newer_pipelines.call(kind, pipe, 3.0, noise) for noise in noises]
    ft.accelerate(pipe, "H1P2", graph=True)
    captures = captures_of(pipe)
    captures.recorder = Fake()
    for noise, result in zip(noises, expected, strict=True):
        assert_close(newer_pipelines.call(kind, pipe, 3.0, noise), result, 1e-5)
    # Two networks need a capture each; Qwen-Image's call with a mask is never captured.
    assert captures.recorder.recorded == (2 if kind == "wan22" else 1)
    assert captures.recorder.replayed >= 6
    assert ("prompts of different lengths" in ft.summary(pipe)) == (kind == "qwen")
    ft.restore(pipe)


def accelerates_hook(network: Any) -> Callable[[], object]:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    add_hook_to_module(network, ModelHook())
    return lambda: remove_hook_from_module(network)


def diffusers_hook(network: Any) -> Callable[[], object]:
    from diffusers.hooks import HookRegistry, ModelHook

    registry = HookRegistry.check_if_exists_or_initialize(network)
    registry.register_hook(ModelHook(), "a hook")
    return lambda: registry.remove_hook("a hook")


def layerwise_casting(network: Any) -> Callable[[], object]:
    network.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32, skip_modules_pattern=()
    )
    return lambda: None


def plain_wrapper(network: Any) -> Callable[[], object]:
    before = network.forward
    network.forward = lambda *args, **kwargs: before(*args, **kwargs)
    return lambda: setattr(network, "forward", before)


HOOKS = (accelerates_hook, diffusers_hook, layerwise_casting, plain_wrapper)


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_came_after_accelerate_stay(hook):
    """And the network is as if it had never been accelerated."""
    alone, pipe = sd3(), sd3()
    hook(alone.transformer)
    expected = call(alone, num_inference_steps=3)
    ft.accelerate(pipe, "H1P2R1", refiner_of(pipe), graph=True)
    captures = captures_of(pipe)
    captures.recorder = Fake()
    call(pipe)
    undo = hook(pipe.transformer)
    forwards = {
        name: vars(module).get("forward") for name, module in pipe.transformer.named_modules()
    }
    call(pipe)
    ft.restore(pipe)
    hooked = [name for name in forwards if forwards[name] is not None]
    kept = [name for name in hooked if vars(pipe.transformer.get_submodule(name)).get("forward")]
    assert kept  # the library's own
    recorded = captures.recorder.recorded, captures.recorder.replayed
    for _ in range(3):
        assert_close(call(pipe, num_inference_steps=3), expected, 1e-6)
    assert (captures.recorder.recorded, captures.recorder.replayed) == recorded
    undo()
    if hook is not layerwise_casting:
        assert_close(call(pipe, num_inference_steps=3), call(sd3(), num_inference_steps=3), 1e-6)
    with ft.accelerated(pipe, "E3", graph=True):
        assert_close(call(pipe), call(pipe), 1e-6)


def test_offloading_hooks_still_work_after_restore():
    """Those of accelerate keep the old forward, and put it back when they go."""
    pipe = sd3()
    expected = call(pipe, num_inference_steps=3)
    ft.accelerate(pipe, "E3", graph=True)
    undo = accelerates_hook(pipe.transformer)
    hook, calls = pipe.transformer._hf_hook, []
    hook.pre_forward = lambda module, *args, **kwargs: (calls.append(1), (args, kwargs))[1]
    ft.restore(pipe)
    assert_close(call(pipe, num_inference_steps=3), expected, 1e-6)
    assert len(calls) == 3
    undo()
    assert_close(call(pipe, num_inference_steps=3), expected, 1e-6)
    assert len(calls) == 3


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("maker", [sd3, flux])
def test_an_accelerated_pipeline_can_be_copied(how, maker):
    pipe = maker()
    stock = call(pipe, num_inference_steps=3)
    ft.accelerate(pipe, "H1P1R1", refiner_of(pipe), graph=True)
    captures_of(pipe).recorder = Fake()
    expected, *_ = [call(pipe, seed=seed) for seed in range(3)]
    other = COPIES[how](pipe)
    assert captures_of(other).report() == []  # its weights lie elsewhere
    assert other.transformer is not pipe.transformer
    assert_close(call(other), expected, 1e-6)
    captures_of(other).recorder = Fake()
    for _ in range(3):
        assert_close(call(other), expected, 1e-6)
    assert captures_of(other).recorder.replayed > 0
    # Their weights are their own, and so are their refiners.
    for parameter in other.transformer.parameters():
        parameter.data.mul_(1.5)
    assert_close(call(pipe), expected, 1e-6)
    for parameter in other.transformer.parameters():
        parameter.data.div_(1.5)
    ft.restore(other)
    assert not other.transformer._forward_hooks
    assert not any("forward" in vars(module) for module in other.transformer.modules())
    assert_close(call(other, num_inference_steps=3), stock, 1e-6)
    assert_close(call(pipe), expected, 1e-6)
    ft.restore(pipe)


def cache_configs(pipe: Any) -> dict[str, Any]:
    now = dict(current_timestep_callback=lambda: 500)
    return {
        "FirstBlockCache": diffusers.FirstBlockCacheConfig(threshold=0.1),
        "PyramidAttentionBroadcast": diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=("transformer_blocks",),
            **now,
        ),
        "TaylorSeerCache": diffusers.TaylorSeerCacheConfig(cache_identifiers=["blocks.*attn"]),
    }


@pytest.mark.parametrize(
    "name", ["FirstBlockCache", "PyramidAttentionBroadcast", "TaylorSeerCache"]
)
def test_graphs_are_refused_beside_a_cache_and_wait_until_it_is_gone(name):
    pipe = flux()
    pipe.transformer.enable_cache(cache_configs(pipe)[name])
    assert counting_cache(pipe.transformer) == f"diffusers' {name}"
    with pytest.raises(ValueError, match=f"graph must be False while diffusers' {name}"):
        ft.accelerate(pipe, "E4", graph=True)
    ft.accelerate(pipe, "E4")  # a plan alone goes with it
    ft.restore(pipe)
    pipe.transformer.disable_cache()
    assert counting_cache(pipe.transformer) is None
    ft.accelerate(pipe, "E4", graph=True)
    captures = captures_of(pipe)
    captures.recorder = Fake()
    expected = call(pipe)
    pipe.transformer.enable_cache(cache_configs(pipe)[name])
    replayed = captures.recorder.replayed
    call(pipe)
    assert captures.recorder.replayed == replayed
    assert f"not captured: diffusers' {name} is in the FluxTransformer2DModel" in ft.summary(pipe)
    pipe.transformer.disable_cache()
    assert_close(call(pipe), expected, 1e-6)
    assert captures.recorder.replayed > replayed
    assert "not captured" not in ft.summary(pipe)


def test_caches_of_other_libraries_and_bare_hooks_are_seen():
    network = flux().transformer
    assert counting_cache(network) is None
    network._is_cached = True
    assert "cache-dit" in str(counting_cache(network))
    del network._is_cached
    network.enable_teacache = True
    assert counting_cache(network) == "TeaCache"
    del network.enable_teacache
    diffusers.hooks.apply_first_block_cache(network, diffusers.FirstBlockCacheConfig(threshold=0.1))
    assert str(counting_cache(network)).startswith("diffusers' hook fbc")


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("maker", [sd3, flux])
def test_compiled_transformers_are_taken(maker, in_place):
    plain, pipe = maker(), maker()
    if in_place:
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    refiner = refiner_of(plain)
    ft.accelerate(plain, "H1P1R1", refiner)
    expected = call(plain)
    call(pipe)
    traces = dict(vars(pipe.transformer))
    with ft.accelerated(pipe, "H1P1R1", refiner):
        assert_close(call(pipe), expected, 1e-6)
    ft.accelerate(pipe, "H1P1R1", refiner, graph=True)
    captures = captures_of(pipe)
    captures.recorder = Fake()
    for _ in range(3):
        assert_close(call(pipe), expected, 1e-6)
    assert captures.recorder.replayed > 0
    ft.restore(pipe)
    assert dict(vars(pipe.transformer)) == traces


@pytest.mark.slow
@pytest.mark.parametrize("maker", [sd3, flux])
def test_compiled_transformers_make_models_and_refiners(maker):
    pipe = maker()
    c = {f"{half}{name}": torch.randn(2, *shape) for half in ("", "negative_")
         for name, shape in (("embeds", (5, 32)), ("pooled", (16,)))}  # fmt: skip
    refiner = refiner_of(pipe)
    model = ft.from_pipeline(pipe, refiner, image_size=32)
    expected = ft.sample(model, "H1R1", c, seed=0)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert type(ft.refiner_for(pipe.transformer)) is type(refiner)
    compiled = ft.from_pipeline(pipe, torch.compile(refiner, backend="eager"), image_size=32)
    assert_close(ft.sample(compiled, "H1R1", c, seed=0), expected, 1e-6)


def test_a_model_whose_weights_move_in_every_run_has_no_graph():
    """It was captured again and again, for ever."""
    pipe = sd3()
    layerwise_casting(pipe.transformer)
    model = ft.from_pipeline(pipe, image_size=32)
    c = {"embeds": torch.randn(2, 5, 32), "pooled": torch.randn(2, 16)}
    expected = ft.sample(model, "E2", c, seed=0)
    recorder = model.captures.recorder = Fake()
    for _ in range(4):
        assert_close(ft.sample(model, "E2", c, seed=0), expected, 1e-6)
    assert recorder.recorded <= 2
    assert "its weights move in every run" in ft.summary(model)
