"""Every flow-matching scheduler of diffusers under a plan: its noise levels, what it tells the
network, what was set on it, and its class stay its own.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_close, relative_error
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from flowturbo.integrations.noise_levels import resampled  # noqa: E402
from flowturbo.integrations.scheduler import PlanScheduler  # noqa: E402

FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
CONFIGURED: dict[str, Any] = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "euler inverted": lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "euler karras": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    "euler terminal": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(flow_shift=5.0, **FLOW),
    "unipc to sigma_min": lambda: diffusers.UniPCMultistepScheduler(
        flow_shift=3.0, final_sigmas_type="sigma_min", **FLOW
    ),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(flow_shift=8.0, **FLOW),
    "dpm++ single": lambda: diffusers.DPMSolverSinglestepScheduler(flow_shift=2.0, **FLOW),
    "deis": lambda: diffusers.DEISMultistepScheduler(flow_shift=2.0, **FLOW),
}


def output(x: Tensor, told: float) -> Tensor:
    return torch.sin(3 * x) + told / 1000 * x.flip(-1)


def start(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


if hasattr(diffusers, "HeliosScheduler"):
    CONFIGURED["helios"] = lambda: diffusers.HeliosScheduler(
        shift=2.0, stages=1, stage_range=[0, 1]
    )


def run(scheduler: Any, x: Tensor, told: list[float] | None = None) -> Tensor:
    for t in scheduler.timesteps:
        if told is not None:
            told.append(float(t))
        x = scheduler.step(output(x, float(t)), t, x, return_dict=False)[0]
    return x


def by_hand(letters: str, sigmas: list[float], told: dict[float, float], x: Tensor) -> Tensor:
    """E, H and A2 in diffusers' own terms, in float64."""
    x, before = x.double(), None
    for letter, a, b in zip(letters, sigmas, sigmas[1:], strict=False):
        h, d = b - a, output(x, told[a])
        if letter == "H" and h:
            x = x + h / 2 * (d + output(x + h * d, told[b]))
        elif letter == "A" and before is not None:
            x = x + h * d + h**2 / (2 * (a - before[0])) * (d - before[1])
        else:
            x = x + h * d
        before = a, d
    return x


@pytest.mark.parametrize("name", CONFIGURED)
@pytest.mark.parametrize("letters", ["EEEEE", "HHEEE", "AAAAA"])
def test_steps_are_those_of_the_formulas_on_the_stock_levels(name, letters):
    stock = CONFIGURED[name]()
    stock.set_timesteps(5)
    sigmas, N = stock.sigmas.tolist(), len(stock.timesteps)
    told = dict(zip(sigmas, stock.timesteps.tolist(), strict=False))
    told.setdefault(sigmas[-1], 1000 * sigmas[-1])
    planned = PlanScheduler.of(CONFIGURED[name](), letters)
    assert type(planned) == type(stock)  # noqa: E721 - as pipelines ask
    assert isinstance(planned, type(stock))
    assert inspect.signature(planned.set_timesteps) == inspect.signature(stock.set_timesteps)
    assert inspect.signature(planned.step) == inspect.signature(stock.step)
    planned.set_timesteps(5)
    heard: list[float] = []
    made = run(planned, start(), heard)
    assert len(heard) == planned.plan.cost.predictor
    assert heard[:1] == [told[sigmas[0]]]
    assert set(heard) == {told[s] for s in sigmas[:N]}
    assert planned.timesteps.dtype == stock.timesteps.dtype
    # float32 levels, and float32 sums of five steps
    assert_close(made, by_hand(letters, sigmas, told, start()), 2e-6)


@pytest.mark.parametrize("name", [name for name in CONFIGURED if name.startswith("euler")])
def test_euler_is_euler_to_the_bit(name):
    stock, planned = CONFIGURED[name](), PlanScheduler.of(CONFIGURED[name](), "E6")
    for scheduler in (stock, planned):
        scheduler.set_timesteps(6)
    assert planned.timesteps.equal(stock.timesteps)
    assert planned.sigmas.equal(stock.sigmas)
    assert run(planned, start()).equal(run(stock, start()))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_the_network_is_told_timesteps_that_a_pipeline_gives_beside_shifted_levels(kind):
    """As CogView4 and GLM-Image do: only the levels are shifted."""
    given = [1000.0, 750.0, 500.0, 250.0, 1.0]
    stock = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear"
    )
    planned = PlanScheduler.of(stock, "E5")
    heun = PlanScheduler.of(stock, "H5")
    for scheduler in (stock, planned, heun):
        scheduler.set_timesteps(timesteps=kind(given), sigmas=kind(given) / 1000, mu=2.0) if (
            kind is not list
        ) else scheduler.set_timesteps(timesteps=given, sigmas=[t / 1000 for t in given], mu=2.0)
    assert planned.timesteps.tolist() == stock.timesteps.tolist() == given
    assert planned.sigmas.equal(stock.sigmas)
    assert set(heun.timesteps.tolist()) == {*given, 0.0}
    alone = PlanScheduler.of(diffusers.FlowMatchEulerDiscreteScheduler(), "E5")
    alone.set_timesteps(timesteps=kind(given))
    assert alone.timesteps.tolist() == given


def test_levels_between_those_of_the_stock_scheduler_are_told_by_interpolation():
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    planned = PlanScheduler.of(stock, "E2", "plan")
    given = [1000.0, 500.0]
    planned.set_timesteps(timesteps=given, sigmas=[1.0, 0.5])
    assert planned.sigmas.tolist() == [1.0, 0.5, 0.0]
    # The stock scheduler shifts 0.5 to 0.75; 0.5 lies two thirds of the way from there to 0.
    assert planned.timesteps.tolist() == pytest.approx([1000.0, 500 * 0.5 / 0.75], rel=1e-6)


def test_what_was_set_on_the_stock_scheduler_survives():
    stock = diffusers.FlowMatchEulerDiscreteScheduler()
    stock.set_shift(7.0)
    stock.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0)
    stock.note = "kept"
    planned = PlanScheduler.of(stock, "E4")
    assert (planned.shift, planned.config.sigma_max, planned.note) == (7.0, 80.0, "kept")
    for scheduler in (stock, planned):
        scheduler.set_timesteps(4)
    assert planned.sigmas.equal(stock.sigmas)
    planned.set_shift(2.0)
    assert stock.shift == 7.0
    x = start()
    assert planned.scale_model_input(x, planned.timesteps[0]) is x


def test_a_subclass_is_taken_unless_its_steps_are_its_own():
    class Shifted(diffusers.FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps=None, device=None, **options):
            super().set_timesteps(num_inference_steps, device, **options)
            self.sigmas = self.sigmas**2
            self.timesteps = self.sigmas[:-1] * 1000

    class Noisy(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, *args, **options):
            return super().step(*args, **options)

    planned = PlanScheduler.of(Shifted(), "E4")
    stock = Shifted()
    for scheduler in (stock, planned):
        scheduler.set_timesteps(4)
    assert run(planned, start()).equal(run(stock, start()))
    assert type(planned) == Shifted  # noqa: E721
    with pytest.raises(TypeError, match="its step is not that of FlowMatchEulerDiscreteScheduler"):
        PlanScheduler.of(Noisy(), "E4")


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: diffusers.FlowMatchHeunDiscreteScheduler(), TypeError, "steps twice.*from_config"),
        (lambda: diffusers.FlowMatchLCMScheduler(), TypeError, "adds noise in every step"),
        (lambda: diffusers.SCMScheduler(), TypeError, "consistency"),
        (lambda: diffusers.UniPCMultistepScheduler(), TypeError, "use_flow_sigmas=True.*epsilon"),
        (
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            ValueError,
            "stochastic_sampling=True can't run a plan",
        ),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
            ValueError,
            "algorithm_type='sde-dpmsolver\\+\\+' can't run a plan",
        ),
        (
            lambda: diffusers.UniPCMultistepScheduler(thresholding=True, **FLOW),
            ValueError,
            "thresholding",
        ),
    ],
)
def test_others_are_refused_with_what_to_do(make, kind, message):
    with pytest.raises(kind, match=message):
        PlanScheduler.of(make(), "E4")


@pytest.mark.parametrize("name", ["euler", "unipc", "dpm++"])
def test_copies_go_on_where_the_first_is(name):
    planned = PlanScheduler.of(CONFIGURED[name](), "H1P4E1")
    planned.set_timesteps(7)
    expected = run(copy.deepcopy(planned), start())
    x = start()
    for t in planned.timesteps[:3]:
        x = planned.step(output(x, float(t)), t, x, return_dict=False)[0]
    for other in (copy.deepcopy(planned), pickle.loads(pickle.dumps(planned)), planned):
        assert type(other) is type(planned)
        y = x
        for t in other.timesteps[3:]:
            y = other.step(output(y, float(t)), t, y, return_dict=False)[0]
        assert y.equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["E3", "H1P2", "A3"])
@pytest.mark.parametrize("inference", [False, True])
def test_latents_that_are_written_in_place_are_the_pipelines_own(plan, dtype, inference):
    """The state is a copy: Kandinsky 5 writes the result into a slice, callbacks change it."""

    def sample(into_a_slice: bool, edit: str) -> Tensor:
        scheduler = PlanScheduler.of(diffusers.FlowMatchEulerDiscreteScheduler(), plan)
        scheduler.set_timesteps(scheduler.calls)
        x = start().to(dtype)
        for i, t in enumerate(scheduler.timesteps):
            v = output(x.float(), float(t)).to(dtype)
            if into_a_slice:
                x[:, :3] = scheduler.step(v, t, x[:, :3], return_dict=False)[0]
            else:
                x = scheduler.step(v, t, x, return_dict=False)[0]
            v.fill_(float("nan"))  # nor is the output kept
            if i == 1 and edit:
                x = x.mul_(0.5) if edit == "in place" else x * 0.5
        return x

    with torch.inference_mode(inference):
        plain = sample(False, "")
        assert sample(True, "").equal(plain)
        halved = sample(False, "anew")
        assert sample(False, "in place").equal(halved)
        assert sample(True, "in place").equal(halved)
        assert relative_error(halved, plain) > 0.05


def test_latents_of_another_shape_go_on_without_earlier_velocities():
    """ChronoEdit drops frames on its way."""
    planned = PlanScheduler.of(diffusers.FlowMatchEulerDiscreteScheduler(), "A4")
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    for scheduler in (planned, euler):
        scheduler.set_timesteps(4)
    x = start()
    for t in planned.timesteps[:2]:
        x = planned.step(output(x, float(t)), t, x, return_dict=False)[0]
    cut = x[:, [0, -1]]
    made = planned.step(output(cut, 500.0), planned.timesteps[2], cut, return_dict=False)[0]
    euler._step_index = 2
    assert_close(made, euler.step(output(cut, 500.0), 500.0, cut, return_dict=False)[0], 1e-6)
    heun = PlanScheduler.of(diffusers.FlowMatchEulerDiscreteScheduler(), "H2")
    heun.set_timesteps(4)
    heun.step(x, heun.timesteps[0], x)
    with pytest.raises(ValueError, match=r"within a step of two calls .* \(2, 2, 4\)"):
        heun.step(cut, heun.timesteps[1], cut)


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_levels_of_another_number_keep_their_ends_and_kind(kind, rising):
    given = [0.0, 0.5, 0.75, 1.0] if rising else [1.0, 0.75, 0.5, 0.25]
    found = resampled(kind(given), 2)
    assert isinstance(found, list if kind is list else np.ndarray)
    assert list(found) == pytest.approx([0.0, 1.0] if rising else [1.0, 0.5])
    assert list(resampled(kind(given), 4)) == given


def test_levels_that_a_pipeline_sets_afterwards_are_those_of_the_plan():
    """Cosmos 2 repeats the level before the last."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    stock.register_to_config(sigma_max=80.0, sigma_min=0.002)
    planned, heun = PlanScheduler.of(stock, "E5"), PlanScheduler.of(stock, "H2E3")
    for scheduler in (stock, planned, heun):
        scheduler.set_timesteps(sigmas=torch.linspace(0, 1, 5))
        scheduler.sigmas[-1] = scheduler.sigmas[-2]
    assert planned.sigmas.equal(stock.sigmas)
    assert run(planned, start()).equal(run(stock, start()))
    told = dict(zip(stock.sigmas.tolist(), stock.timesteps.tolist(), strict=False))
    assert_close(run(heun, start()), by_hand("HHEEE", stock.sigmas.tolist(), told, start()), 1e-5)
    heun.set_timesteps(5)
    heun.sigmas = heun.sigmas[:-1]
    with pytest.raises(ValueError, match="has set 7 sigmas"):
        run(heun, start())


def test_a_network_that_is_not_finite_on_data_is_named():
    planned = PlanScheduler.of(diffusers.FlowMatchEulerDiscreteScheduler(), "H1P5")
    planned.set_timesteps(7)
    x = start()
    for i, t in enumerate(planned.timesteps[:-1]):
        x = planned.step(x.sin() * planned.sigmas[i], t, x, return_dict=False)[0]
    v = x.sin() * planned.sigmas[-2] / planned.sigmas[-2]
    with pytest.raises(ValueError, match=r"noise level 0, where .*such as A7 or H1P4E1"):
        planned.step(v, planned.timesteps[-1], x)


@pytest.mark.parametrize("first", range(7))
def test_a_run_begins_at_the_call_that_the_slice_begins_with(first):
    """Wan's video-to-video sets no begin index, and H3E1 calls twice at three levels."""
    planned = PlanScheduler.of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "H3E1")

    def rest(begin: bool) -> Tensor:
        planned.set_timesteps(7)
        if begin:
            planned.set_begin_index(first)
        x = start()
        for t in planned.timesteps[first:]:
            x = planned.step(output(x, float(t)), t, x, return_dict=False)[0]
        assert planned._run is None
        return x

    assert rest(False).equal(rest(True))


def test_a_call_too_many_is_refused():
    planned = PlanScheduler.of(diffusers.FlowMatchEulerDiscreteScheduler(), "E3")
    planned.set_timesteps(3)
    x = run(planned, start())
    with pytest.raises(ValueError, match="makes 3 predictor calls, and the pipeline makes another"):
        planned.step(x, planned.timesteps[-1].clone(), x)


@pytest.mark.parametrize("sigmas", [[1, 0.7, 0.7, 0.3], [1, 1, 0.7, 0.3], [1, 0.7, 0.3, 0]])
@pytest.mark.parametrize("letters", ["AAAA", "EEEE", "UUUU", "DDDD"])
def test_levels_that_repeat_stand_still(sigmas, letters):
    planned = PlanScheduler.of(diffusers.FlowMatchEulerDiscreteScheduler(), letters)
    planned.set_timesteps(sigmas=sigmas)
    made = run(planned, start())
    assert made.isfinite().all()
    if letters == "EEEE" and sigmas[0] != sigmas[1]:  # where the stock scheduler loses count
        stock = diffusers.FlowMatchEulerDiscreteScheduler()
        stock.set_timesteps(sigmas=sigmas)
        assert made.equal(run(stock, start()))


def test_a_zero_at_the_end_of_given_levels_is_their_end():
    assert resampled([1.0, 0.7, 0.5, 0.3, 0.0], 4) == [1.0, 0.7, 0.5, 0.3]
    assert resampled([1.0, 0.5, 0.0], 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_a_scheduler_whose_methods_were_replaced_is_refused():
    stock = diffusers.FlowMatchEulerDiscreteScheduler()
    own = stock.step
    stock.step = lambda *args, **options: own(*args, **options)
    with pytest.raises(TypeError, match="whose step was replaced on the instance"):
        PlanScheduler.of(stock, "E4")


def test_a_shallow_copy_has_a_run_of_its_own():
    planned = PlanScheduler.of(diffusers.FlowMatchEulerDiscreteScheduler(), "A4")
    planned.set_timesteps(4)
    expected = run(copy.copy(planned), start())
    x = start()
    for i, t in enumerate(planned.timesteps):
        if i == 2:
            run(copy.copy(planned), start(1))
        x = planned.step(output(x, float(t)), t, x, return_dict=False)[0]
    assert x.equal(expected)
