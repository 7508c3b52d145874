"""The ComfyUI nodes, called as ComfyUI calls them."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import comfy_stand_in as comfy
import pytest
import torch
from close import assert_close, relative_error
from paths import ROOT
from torch import Tensor

import flowturbo as ft
from flowturbo.integrations.k_diffusion import PlanSampler

if sys.version_info >= (3, 11):
    import tomllib

PACKAGE = ROOT / "integrations" / "comfyui"


class Flux(comfy.ModelSamplingFlux, comfy.CONST):
    pass


class SD3(comfy.ModelSamplingDiscreteFlow, comfy.CONST):
    pass


class SD15(comfy.ModelSamplingDiscreteFlow, comfy.EPS):
    pass


def network(x: Tensor, sigma: Tensor, condition: float) -> Tensor:
    """noise - data, curved, another one for each condition."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return condition * torch.sin(2 * x) * (1 + s) + x * s**2


def guided(scale: float) -> Callable[..., Tensor]:
    """The network at the conditions of `guider`, guided, for ft.sample."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        conditional, unconditional = (network(x, sigma.expand(len(x)), c) for c in (0.7, -0.4))
        return unconditional + scale * (conditional - unconditional)

    return velocity


def guider(sampling: Any = None, cfg: float = 1.0, network: Any = network) -> comfy.CFGGuider:
    model = comfy.Model(SD3(3.0) if sampling is None else sampling, network)
    return comfy.CFGGuider(comfy.ModelPatcher(model), 0.7, -0.4, cfg)


@pytest.fixture
def nodes(monkeypatch, tmp_path) -> Iterator[Any]:
    """The package, imported as ComfyUI imports a folder of custom_nodes."""
    for name, module in comfy.modules(tmp_path / "models").items():
        monkeypatch.setitem(sys.modules, name, module)
    name = str(tmp_path / "custom_nodes" / "flowturbo").replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, PACKAGE / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, package)
    spec.loader.exec_module(package)
    yield package
    sys.modules.pop(f"{name}.nodes", None)


def run(nodes: Any, node: str, **inputs: Any) -> tuple[Any, ...]:
    """A node's outputs, after the checks that ComfyUI makes when a workflow is queued."""
    kind = nodes.NODE_CLASS_MAPPINGS[node]
    assert inputs.keys() <= kind.INPUT_TYPES()["required"].keys()
    if "plan" in inputs:
        assert kind.VALIDATE_INPUTS(plan=inputs["plan"]) is True
    outputs = getattr(kind(), kind.FUNCTION)(**inputs)
    assert len(outputs) == len(kind.RETURN_TYPES)
    return outputs


def sampler_of(nodes: Any, plan: str) -> Any:
    return run(nodes, "FlowTurboSampler", plan=plan)[0]


NOISE = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
EMPTY = torch.zeros_like(NOISE)
SOURCE = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(1))


# The sampler


@pytest.mark.parametrize("cfg", [1.0, 3.5])
@pytest.mark.parametrize("sampling", [Flux(1.15), SD3(3.0)], ids=["flux", "sd3"])
@pytest.mark.parametrize("latent, start", [(EMPTY, 0), (SOURCE, 8)], ids=["text", "image"])
def test_e20_is_comfyuis_euler(nodes, sampling, cfg, latent, start):
    sigmas = comfy.simple_scheduler(sampling, 20 + start)[start:]

    def sampled(sampler: Any) -> tuple[Tensor, list[Any]]:
        seen: list[Any] = []
        samples = guider(sampling, cfg).sample(
            NOISE, latent, sampler, sigmas, callback=lambda *args: seen.append(args)
        )
        return samples, seen

    samples, ours = sampled(sampler_of(nodes, "E20"))
    euler, theirs = sampled(comfy.KSAMPLER(comfy.sample_euler))
    assert_close(samples, euler, 1e-6)
    assert len(ours) == 20
    for (i, denoised, x, total), (j, expected, at, of) in zip(ours, theirs, strict=True):
        assert (i, total) == (j, of)
        assert_close(denoised, expected, 1e-5)
        assert_close(x, at, 1e-6)


@pytest.mark.parametrize("cfg", [1.0, 3.5])
@pytest.mark.parametrize("plan", ["A7", "B6", "H1A5", "H1P4E1", "E1C6"])
def test_plans_are_those_of_sample(nodes, plan, cfg):
    sigmas, calls = run(nodes, "FlowTurboSigmas", model=guider().model_patcher, plan=plan)
    assert calls == ft.Plan.parse(plan).cost.predictor
    assert_close(sigmas, 1 - torch.tensor(ft.Plan.parse(plan, shift=3.0).grid), 1e-6)
    noise, on_them = NOISE.double(), ft.Plan.parse(plan, grid=[1 - s for s in sigmas.tolist()])
    samples = guider(cfg=cfg).sample(noise, EMPTY, sampler_of(nodes, plan), sigmas)
    expected = ft.sample(guided(cfg), on_them, noise=noise, convention="sigma")
    assert_close(samples, expected, 1e-12)
    euler = ft.sample(guided(cfg), f"E{calls}", noise=noise, convention="sigma")
    assert relative_error(samples, euler) > 1e-3


def test_an_image_is_the_start_of_edit(nodes):
    """From the image mixed with noise, as ft.edit starts."""
    plan = "A6"
    sigmas, _ = run(
        nodes, "FlowTurboSigmas", model=guider().model_patcher, plan=plan, denoise=0.6, grid="plan"
    )
    samples = guider().sample(NOISE, SOURCE, sampler_of(nodes, plan), sigmas)
    x, past = 0.6 * NOISE.double() + 0.4 * SOURCE.double(), None
    for s0, s1 in itertools.pairwise(torch.linspace(0.6, 0, 7, dtype=torch.float64)):
        v = -network(x, s0.expand(3), 0.7)
        x, past = x + (s0 - s1) * (v if past is None else 1.5 * v - 0.5 * past), v
    assert_close(samples, x, 1e-5)


@pytest.mark.parametrize("plan", ["E6", "A6", "H1P4E1"])
def test_inpainting_keeps_what_is_outside_the_mask(nodes, plan):
    mask = torch.zeros(3, 1, 6, 5)
    mask[..., 2:] = 1
    sigmas, _ = run(nodes, "FlowTurboSigmas", model=guider().model_patcher, plan=plan)
    sampler = sampler_of(nodes, plan)
    samples = guider().sample(NOISE, SOURCE, sampler, sigmas, denoise_mask=mask)
    assert_close(samples[..., :2], SOURCE[..., :2], 1e-5)
    assert relative_error(samples[..., 2:], SOURCE[..., 2:]) > 0.1
    everywhere = guider().sample(NOISE, SOURCE, sampler, sigmas, denoise_mask=mask * 0 + 1)
    assert_close(everywhere, guider().sample(NOISE, SOURCE, sampler, sigmas), 1e-6)
    if plan == "E6":
        euler = comfy.KSAMPLER(comfy.sample_euler)
        expected = guider().sample(NOISE, SOURCE, euler, sigmas, denoise_mask=mask)
        assert_close(samples, expected, 1e-6)


def test_each_step_is_shown_once(nodes):
    seen = []
    sigmas, calls = run(nodes, "FlowTurboSigmas", model=guider().model_patcher, plan="H2P2E1")
    guider().sample(
        NOISE,
        EMPTY,
        sampler_of(nodes, "H2P2E1"),
        sigmas,
        callback=lambda i, denoised, x, total: seen.append((i, total, denoised.shape)),
    )
    assert seen == [(i, 5, NOISE.shape) for i in range(5)]
    assert calls == 7


def test_interruption_passes_through(nodes):
    class Interrupted(Exception):
        pass

    calls = []

    def interrupted(x: Tensor, sigma: Tensor, condition: float) -> Tensor:
        calls.append(sigma)
        if len(calls) == 3:
            raise Interrupted
        return network(x, sigma, condition)

    def stop(*_: Any) -> None:
        raise Interrupted

    sampler = sampler_of(nodes, "A7")
    sigmas = comfy.simple_scheduler(SD3(3.0), 7)
    with pytest.raises(Interrupted):
        guider(network=interrupted).sample(NOISE, EMPTY, sampler, sigmas)
    assert len(calls) == 3
    with pytest.raises(Interrupted):
        guider().sample(NOISE, EMPTY, sampler, sigmas, callback=stop)
    again = guider().sample(NOISE, EMPTY, sampler, sigmas)
    assert again.equal(guider().sample(NOISE, EMPTY, sampler_of(nodes, "A7"), sigmas))


def test_a_run_may_be_split(nodes):
    """As SplitSigmas and two samplers do, the second without noise."""
    sigmas = comfy.simple_scheduler(SD3(3.0), 7)
    whole = guider().sample(NOISE, EMPTY, sampler_of(nodes, "E7"), sigmas)
    # The first part may end in a call: its last level is above 0.
    part = guider().sample(NOISE, EMPTY, sampler_of(nodes, "E3"), sigmas[:4])
    assert_close(guider().sample(EMPTY, part, sampler_of(nodes, "E4"), sigmas[3:]), whole, 1e-5)
    assert guider().sample(NOISE, EMPTY, sampler_of(nodes, "H1P2"), sigmas[:4]).isfinite().all()


def test_16_bit_states_and_videos(nodes):
    sampler = sampler_of(nodes, "A5")
    sigmas = comfy.simple_scheduler(SD3(3.0), 5)
    video = torch.randn(1, 4, 3, 5, 5)
    assert guider().sample(video, video * 0, sampler, sigmas).shape == video.shape
    given = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        given.append((x.dtype, sigma.dtype))
        return x / 2

    x = PlanSampler("A5")(denoiser, NOISE.bfloat16(), sigmas)
    assert given == [(torch.bfloat16, torch.bfloat16)] * 5
    assert x.dtype == torch.bfloat16
    expected = PlanSampler("A5")(lambda x, sigma: x / 2, NOISE.bfloat16().double(), sigmas)
    assert_close(x, expected, 2**-6)
    with pytest.raises(ValueError, match=r"needs 6 sigmas, got \(1, 6\)"):
        PlanSampler("A5")(denoiser, NOISE, sigmas[None])


# Sigmas


@pytest.mark.parametrize("sampling", [Flux(1.15), SD3(3.0), SD3(1.0)])
def test_sigmas_have_the_models_shift(nodes, sampling):
    model = guider(sampling).model_patcher
    sigmas, calls = run(nodes, "FlowTurboSigmas", model=model, plan="H1P7")
    assert calls == 9
    # 8 and 20 steps divide the table of levels that the scheduler reads.
    assert_close(sigmas, comfy.simple_scheduler(sampling, 8), 1e-6)
    half, _ = run(nodes, "FlowTurboSigmas", model=model, plan="A10", denoise=0.5)
    assert_close(half, comfy.simple_scheduler(sampling, 20)[10:], 1e-6)
    assert sigmas[0] == 1
    assert sigmas[-1] == half[-1] == 0
    nothing, calls = run(nodes, "FlowTurboSigmas", model=model, plan="A8", denoise=0.0)
    assert (len(nothing), calls) == (0, 0)
    assert guider().sample(NOISE, SOURCE, sampler_of(nodes, "A8"), nothing).equal(SOURCE)


@pytest.fixture
def plan_file(nodes, tmp_path) -> str:
    folder = tmp_path / "models" / "flowturbo" / "mine"
    folder.mkdir(parents=True)
    ft.Plan.parse("A3", grid=[0, 0.5, 0.8, 1]).save(folder / "own.json")
    ft.Plan("ELL", (0.0, 0.3, 0.6, 1.0), weights=((0.4, -0.1), (0.6, -0.2))).save(
        folder / "fitted.json"
    )
    (folder / "notes.txt").write_text("not a plan")
    return "mine/own.json"


def test_plan_files_are_chosen_by_name_and_have_their_own_grid(nodes, plan_file):
    kind = nodes.NODE_CLASS_MAPPINGS["FlowTurboPlanFile"]
    assert kind.INPUT_TYPES()["required"]["file"] == (["mine/fitted.json", plan_file],)
    assert run(nodes, "FlowTurboPlanFile", file=plan_file) == (plan_file,)
    model = guider().model_patcher
    own, _ = run(nodes, "FlowTurboSigmas", model=model, plan=plan_file)
    assert_close(own, torch.tensor([1, 0.5, 0.2, 0]), 1e-7)
    half, _ = run(nodes, "FlowTurboSigmas", model=model, plan=plan_file, denoise=0.5)
    assert_close(half, torch.tensor([0.5, 0.25, 0.1, 0]), 1e-7)
    even, _ = run(nodes, "FlowTurboSigmas", model=model, plan=plan_file, grid="model")
    expected, _ = run(nodes, "FlowTurboSigmas", model=model, plan="A3")
    assert even.equal(expected)
    samples = guider().sample(NOISE, EMPTY, sampler_of(nodes, plan_file), own)
    plan = ft.Plan.parse("A3", grid=[0, 0.5, 0.8, 1])
    assert_close(samples, ft.sample(guided(1.0), plan, noise=NOISE, convention="sigma"), 1e-6)


@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_fitted_weights_hold_on_their_own_levels(nodes, plan_file, denoise):
    fitted, model = "mine/fitted.json", guider().model_patcher
    sigmas, _ = run(nodes, "FlowTurboSigmas", model=model, plan=fitted, denoise=denoise)
    assert_close(sigmas, denoise * torch.tensor([1, 0.7, 0.4, 0]), 1e-6)
    sampler = sampler_of(nodes, fitted)
    samples = guider().sample(NOISE, EMPTY, sampler, sigmas)
    x, past = denoise * NOISE.double(), None
    rows = [(0.3, 0.0), (0.4, -0.1), (0.6, -0.2)]
    for s, (own, before) in zip(sigmas.double(), rows, strict=False):
        v = -network(x, s.expand(3), 0.7)
        x, past = x + denoise * (own * v + (0 if past is None else before * past)), v
    assert_close(samples, x, 1e-5)
    with pytest.raises(ValueError, match=r"fitted weights.*sigmas must be 1, 0.7, 0.4, 0$"):
        guider().sample(NOISE, EMPTY, sampler, torch.tensor([1.0, 0.6, 0.4, 0]))


def test_a_changed_file_changes_the_node(nodes, plan_file, tmp_path):
    kind = nodes.NODE_CLASS_MAPPINGS["FlowTurboSigmas"]
    before = kind.IS_CHANGED(plan=plan_file, denoise=1.0, grid="auto")
    assert before == kind.IS_CHANGED(plan=plan_file)
    ft.Plan.parse("A3").save(tmp_path / "models" / "flowturbo" / plan_file)
    assert kind.IS_CHANGED(plan=plan_file) != before
    assert kind.IS_CHANGED(plan=None) == ""


# Refusals


@pytest.mark.parametrize(
    "plan, sigmas, said",
    [
        ("A7", [1, 0.5, 0], "plan A7 has 7 steps and needs 8 sigmas, got .3,.: give the sched"),
        ("H1P1", [1, 0.5, 0], "plan H1P1 ends with a model call at noise level 0.*H1P4E1"),
        ("E1H1", [1, 0.5, 0], "ends with a model call at noise level 0"),
        ("A2", [0, 0.5, 1], "from at most 1 to at least 0, got 0 to 1|must fall strictly"),
        ("A2", [1, 1, 0], r"must fall strictly, but sigmas\[0\] = 1 is followed by 1"),
        ("A2", [1, float("nan"), 0], r"must fall strictly, but sigmas\[0\] = 1 .* by nan"),
        ("A2", [14.6, 1, 0], "of a flow model, from at most 1 to at least 0, got 14.6 to 0"),
        ("A2", [1, 0.5, -0.1], "from at most 1 to at least 0, got 1 to -0.1"),
    ],
)
def test_sigmas_that_do_not_fit_are_refused(nodes, plan, sigmas, said):
    with pytest.raises(ValueError, match=said):
        guider().sample(NOISE, EMPTY, sampler_of(nodes, plan), torch.tensor(sigmas))


def test_models_that_are_no_flow_models_are_refused(nodes):
    model = guider(SD15(1.0))
    said = r"a plan needs a flow model, such as SD3.*\(ModelSamplingDiscreteFlow, EPS\)"
    with pytest.raises(ValueError, match=said):
        run(nodes, "FlowTurboSigmas", model=model.model_patcher, plan="A2")
    with pytest.raises(ValueError, match=said):
        model.sample(NOISE, EMPTY, sampler_of(nodes, "A2"), torch.tensor([1, 0.5, 0]))


@pytest.mark.parametrize(
    "plan, said",
    [
        ("H1P2R1", "plan H1P2R1 has refiner steps, and a sampler has no refiner"),
        ("E1S1", "has refiner steps"),
        ("Z3", "plan must look like 'H1P5R3'"),
        ("", "got an empty string"),
        ("mine.json", "there is no plan file 'mine.json' in models/flowturbo"),
        ("../secret.json", "there is no plan file"),
        ("mine/interval.json", r"must have no guidance interval, got \(0.2, 0.8\)"),
        ("mine/broken.json", "is no plan file"),
    ],
)
def test_plans_that_do_not_fit_are_told_when_the_workflow_is_queued(
    nodes, plan_file, tmp_path, plan, said
):
    folder = tmp_path / "models" / "flowturbo" / "mine"
    ft.Plan.parse("A2", guidance_interval=(0.2, 0.8)).save(folder / "interval.json")
    (folder / "broken.json").write_text("{}")
    for node in ("FlowTurboSampler", "FlowTurboSigmas"):
        answer = nodes.NODE_CLASS_MAPPINGS[node].VALIDATE_INPUTS(plan=plan)
        assert isinstance(answer, str)
        assert re.search(said, answer)
    assert nodes.NODE_CLASS_MAPPINGS["FlowTurboSampler"].VALIDATE_INPUTS(plan=None) is True


# The package


def test_the_package_is_what_comfyui_expects(nodes):
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for kind in nodes.NODE_CLASS_MAPPINGS.values():
        assert hasattr(kind, kind.FUNCTION)
        assert kind.CATEGORY == "sampling/flowturbo"
        assert kind.INPUT_TYPES().keys() == {"required"}
        names = getattr(kind, "RETURN_NAMES", kind.RETURN_TYPES)
        assert len(names) == len(kind.RETURN_TYPES)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is of Python 3.11")
def test_versions_and_wheels():
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())
    theirs = tomllib.loads((PACKAGE / "pyproject.toml").read_text())
    version = ours["project"]["version"]
    assert theirs["project"]["version"] == version
    requirement = f"flowturbo>={version}"
    assert theirs["project"]["dependencies"] == [requirement]
    assert (PACKAGE / "requirements.txt").read_text().split() == [requirement]
    assert "DisplayName" in theirs["tool"]["comfy"]
    assert not [name for name in ours["tool"]["setuptools"]["packages"] if "comfy" in name]
