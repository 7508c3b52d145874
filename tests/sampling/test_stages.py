"""Plans with stages on small random text-to-image models: the stages, their batches and graphs.

Random weights say nothing about the quality of images.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from fake_recorder import Fake
from newer_pipelines import conditions, newer
from pipelines import SIZE, flux, sd3
from prompt_models import KINDS, conditioning, model_of, noise_of
from scipy.fft import dctn, idctn
from tiny import tiny_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import flowturbo as ft
from flowturbo.runtime.rng import later_noise

TWO = "A2 at 1/2 + H1A1 from 0.6"
GUIDANCE = {"sd3": 3.0, "flux": 3.5, "2rf": 1.5, "qwen": 4.0, "zimage": 3.0}
ALL = (*KINDS, "qwen", "zimage")


@pytest.fixture(scope="module")
def models() -> dict[str, ft.PromptModel]:
    return {
        kind: model_of(kind) if kind in KINDS else ft.from_pipeline(newer(kind), image_size=SIZE)
        for kind in ALL
    }


def encoded(kind: str, count: int = 2) -> dict[str, Tensor]:
    """Encoded prompts, of different lengths where a kind has any."""
    if kind in KINDS:
        return conditioning(kind, 2, count)
    rows = [conditions(kind, seed) for seed in range(-(-count // 2))]
    return {name: torch.cat([row[name] for row in rows])[:count] for name in rows[0]}


def rows_of(conditions: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in conditions.items()}


@pytest.mark.parametrize("kind", ALL)
def test_one_stage_is_the_plain_plan_to_the_bit(models, kind):
    model, options = models[kind], dict(guidance=GUIDANCE[kind], seed=4)
    prompts = encoded(kind)
    plain = ft.sample(model, "H1A2", prompts, **options)
    assert ft.sample(model, "H1A2 at 1", prompts, **options).equal(plain)
    assert ft.sample(model, ft.StagedPlan((ft.Stage("H1A2"),)), prompts, **options).equal(plain)
    # Stages of one size, whose noise levels match, are one plan in parts.
    t = ft.Plan.parse("E4", shift=model.shift).grid[2]
    parts = ft.sample(model, f"E2 + E2 from {1 - t}", prompts, **options)
    assert_close(parts, ft.sample(model, "E4", prompts, **options), 1e-5)


def velocity(model: ft.PromptModel, x: Tensor, t: float, c: dict[str, Tensor], s: float) -> Tensor:
    """Guided by two calls in turn, or by the scale as an input."""
    times = torch.full((len(x),), t, dtype=x.dtype)
    if model.guidance_style == "embedded":
        return model.predictor(x, times, {**c, "embedded_guidance": torch.full_like(times, s)})
    half, other = (
        {k.removeprefix("negative_"): v for k, v in c.items() if ("negative" in k) == negative}
        for negative in (False, True)
    )
    u, v = model.predictor(x, times, other), model.predictor(x, times, half)
    return u + s * (v - u)


def euler(model: ft.PromptModel, x: Tensor, grid: list[float], c: Any, s: float) -> Any:
    v = x
    for t0, t1 in pairwise(grid):
        v = velocity(model, x, t0, c, s)
        x = x + (t1 - t0) * v
    return x, v


def grid_of(start: float, end: float, steps: int, shift: float) -> list[float]:
    """From the noise level `start` to `end`, in equal steps before the shift."""
    first, last = (s / (shift - (shift - 1) * s) for s in (start, end))
    levels = [first + (last - first) * i / steps for i in range(steps + 1)]
    return [1 - shift * s / (1 + (shift - 1) * s) for s in levels]


@pytest.mark.parametrize("stop", [None, 0.3])
@pytest.mark.parametrize("kind, pipeline", [("sd3", sd3), ("flux", flux)])
def test_stages_are_those_of_an_independent_program(kind, pipeline, stop):
    model = ft.from_pipeline(pipeline(), image_size=(SIZE, SIZE + 16), dtype=torch.float64)
    small = ft.from_pipeline(pipeline(), image_size=(SIZE // 2, SIZE // 2 + 8))
    c = {name: value.double() for name, value in conditioning(kind).items()}
    noise, s = noise_of(model).double(), GUIDANCE[kind]
    H, W = model.latent_shape[1:]
    h, w = H // 2, W // 2
    # SD3's shift is constant, and falls with the side; FLUX's follows its scheduler.
    shift = model.shift / 2 if kind == "sd3" else small.shift
    level = 0.7 / (0.7 + 2 * 0.3)
    end = level if stop is None else stop

    spectrum = dctn(noise.numpy(), axes=(2, 3), norm="ortho")
    own = spectrum[..., :h, :w]
    x = torch.from_numpy(idctn(own, axes=(2, 3), norm="ortho"))
    x, v = euler(model, x, grid_of(1.0, end, 3, shift), c, s)
    estimate, low = x + end * v, x - (1 - end) * v
    if stop is not None:
        kept = (stop / (1 - stop)) / (level / (1 - level))
        new = later_noise(noise, tuple(low.shape[1:]), 1)
        low = kept * low + math.sqrt(1 - kept**2) * new.double()
    spectrum[..., :h, :w] = dctn(low.numpy(), axes=(2, 3), norm="ortho")
    larger = torch.from_numpy(idctn(spectrum, axes=(2, 3), norm="ortho"))
    x = 0.3 * F.interpolate(estimate, (H, W), mode="bicubic") + 0.7 * larger
    x, _ = euler(model, x, grid_of(0.7, 0.0, 2, model.shift), c, s)

    to = "" if stop is None else f" to {stop}"
    found = ft.sample(
        model, f"E3 at 1/2{to} + E2 from 0.7", c, noise=noise, guidance=s, batch_size=2
    )
    assert found.dtype == torch.float64
    assert_close(found, x, 1e-6 if kind == "flux" else 1e-12)  # FLUX's positions are in float32


@pytest.mark.parametrize(
    "kind", ["sd3", "flux", "qwen", "zimage", pytest.param("2rf", marks=pytest.mark.slow)]
)
def test_images_in_any_order_and_split_are_the_same_to_the_last_bit(models, kind):
    model, plan, N = models[kind], "A2 at 1/2 to 0.2 + E1 at 3/4 from 0.7 + E1 from 0.5", 5
    prompts, noise = encoded(kind, N), noise_of(model, N, 3)
    if kind == "qwen":  # prompts of one length: others are masked together with their neighbours
        prompts = {name: value.clamp(max=3) if "lengths" in name else value
                   for name, value in prompts.items()}  # fmt: skip
    common = dict(guidance=GUIDANCE[kind])
    for sizes in (2, (4, 3, 2)):
        base = ft.sample(model, plan, prompts, seed=3, batch_size=sizes, **common)
        order = torch.randperm(N)
        shuffled = ft.sample(
            model, plan, rows_of(prompts, order), noise=noise[order], batch_size=sizes, **common
        )
        assert shuffled.equal(base[order])
        for rows in torch.randperm(N).split([1, 4]):
            part = ft.sample(
                model, plan, rows_of(prompts, rows), noise=noise[rows], batch_size=sizes, **common
            )
            assert part.equal(base[rows])
    for other in ((1, 7, 3), None):
        found = ft.sample(model, plan, prompts, seed=3, batch_size=other, **common)
        assert_close(found, base, 1e-5)


def test_each_stage_runs_at_its_size_with_batches_of_its_own(models, monkeypatch):
    model, seen = model_of("sd3"), []
    forward = model.predictor.forward
    monkeypatch.setattr(
        model.predictor,
        "forward",
        lambda x, t, *c: seen.append((*x.shape, *t.tolist())) or forward(x, t, *c),
    )
    ft.sample(model, "E1 at 1/4 + E1 at 2/3 from 0.8 + E1 from 0.6", conditioning("sd3", count=4),
              seed=0, batch_size=(4, 3, 2))  # fmt: skip
    assert [shape[:4] for shape in seen] == [
        (4, 4, 4, 4),
        *[(3, 4, 10, 10)] * 2,  # 2/3 of 16, of which the sides must be even
        *[(2, 4, 16, 16)] * 2,
    ]
    assert [shape[4] for shape in seen] == pytest.approx([0, 0.2, 0.2, 0.4, 0.4])


def test_the_composition_is_that_of_the_seed(models):
    """The first noise of a small stage is the coarse part of the large noise."""
    model, prompts, seen = models["sd3"], conditioning("sd3"), []
    noise = noise_of(model)
    ft.sample(model, TWO, prompts, noise=noise, callback=seen.append)
    t = seen[0].t
    estimate, x = seen[0].denoised, seen[0].x
    found = (x - t * estimate) / (1 - t)  # of the first Euler step, the noise itself
    low = idctn(
        dctn(noise.numpy(), axes=(2, 3), norm="ortho")[..., :8, :8], axes=(2, 3), norm="ortho"
    )
    assert_close(found, torch.from_numpy(low), 1e-5)


def test_a_callback_counts_the_steps_of_all_stages_and_can_end_them(models):
    model, prompts = models["sd3"], conditioning("sd3", count=3)
    infos: list[ft.StepInfo] = []
    options: Any = dict(seed=1, guidance=2.0, batch_size=2)
    whole = ft.sample(model, TWO, prompts, callback=infos.append, **options)
    assert [(i.step, i.steps, i.first, *i.x.shape) for i in infos] == [
        *[(step, 4, 0, 2, 4, 8, 8) for step in (1, 2)],
        *[(step, 4, 2, 1, 4, 8, 8) for step in (1, 2)],
        *[(step, 4, 0, 2, 4, 16, 16) for step in (3, 4)],
        *[(step, 4, 2, 1, 4, 16, 16) for step in (3, 4)],
    ]
    assert whole.equal(ft.sample(model, TWO, prompts, **options))
    first = ft.sample(model, TWO, prompts, callback=lambda info: False, **options)
    assert first.equal(infos[0].x)
    ended = ft.sample(
        model, TWO, prompts, callback=lambda i: (i.step, i.first) != (2, 2), **options
    )
    assert_close(ended, torch.cat([infos[1].x, infos[3].x]), 1e-6)
    small = ft.sample(model, TWO, prompts, callback=lambda info: False, output="uint8", **options)
    assert small.shape == (2, SIZE // 2, SIZE // 2, 3)


def test_each_stage_is_captured_once_for_its_batches():
    model, recorder = model_of("sd3"), Fake()
    model.captures.recorder = recorder
    options: Any = dict(guidance=2.0, batch_size=(2, 1), output="uint8")
    prompts = conditioning("sd3")
    first, second, third = (ft.sample(model, TWO, prompts, seed=s, **options) for s in (1, 2, 2))
    assert second.equal(third)
    assert not first.equal(second)
    plain = model_of("sd3")
    for seed, found in ((1, first), (2, second)):
        assert found.equal(ft.sample(plain, TWO, prompts, seed=seed, **options))
    # The second stage was run twice, with one image each, in the first call already.
    kept = [
        (c.key.what.latent_shape, c.key.size, str(c.key.what.plan)) for c in model.captures.report()
    ]
    assert sorted(kept) == [((4, 8, 8), 2, "A2"), ((4, 16, 16), 1, "H1A1")]
    assert recorder.recorded == 2
    assert "to a stage of 8 x 8" in ft.summary(model)
    ft.sample(model, "A2", prompts, **options | {"batch_size": 2})  # another kind of run
    assert recorder.recorded == 2


def test_stages_are_captured_ahead():
    model, recorder = model_of("flux"), Fake()
    model.captures.recorder = recorder
    prompts = conditioning("flux")
    one = {name: value[:1] for name, value in prompts.items()}
    captures = ft.compile(model, [TWO, "E1"], 2, prompts=one)
    assert [c.key.what.latent_shape[1] for c in captures] == [8, 16, 16]
    found = ft.sample(model, TWO, prompts, guidance=3.0, seed=3)
    assert (recorder.recorded, [c.hits for c in captures]) == (3, [1, 1, 0])
    assert found.equal(ft.sample(model_of("flux"), TWO, prompts, guidance=3.0, seed=3))


class Doubled(nn.Module):
    """A network that enlarges fourfold, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)
        self.seen: list[Any] = []

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float64
        self.seen.append((images.shape, float(images.min()), float(images.max())))
        return self.gain * images.repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_images_are_enlarged_where_and_by_what_is_asked(models):
    model, prompts = models["sd3"], conditioning("sd3")
    network, sizes = Doubled(), []

    def nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
        sizes.append((tuple(x.shape), size))
        return F.interpolate(x, size)

    def run(**options: Any) -> Tensor:
        return ft.sample(model, TWO, prompts, seed=2, guidance=2.0, **options)

    results = [run(), *(run(enlarge=e) for e in ("pixels", network, ("latents", nearest)))]
    assert run(enlarge="latents").equal(results[0])
    for i, one in enumerate(results):
        for other in results[:i]:
            assert not torch.allclose(one, other, atol=1e-3)
    assert sizes == [((2, 4, 8, 8), (16, 16))]
    ((shape, low, high),) = network.seen
    assert tuple(shape) == (2, 3, SIZE // 2, SIZE // 2)
    assert 0 <= low < high <= 1
    # Pixels, in steps.
    infos: list[ft.StepInfo] = []
    run(enlarge="pixels", callback=infos.append)
    half = infos[1]
    v = (half.denoised - half.x) / (1 - half.t)
    images = model.vae.decode(half.denoised).permute(0, 3, 1, 2) / 255  # type: ignore[union-attr]
    larger = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    bytes_ = (255 * larger).round().to(torch.uint8).permute(0, 2, 3, 1)
    estimate = model.vae.encode(bytes_)[0]  # type: ignore[union-attr]
    spectrum = dctn(noise_of(model, 2, 2).numpy(), axes=(2, 3), norm="ortho")
    spectrum[..., :8, :8] = dctn((half.x - half.t * v).numpy(), axes=(2, 3), norm="ortho")
    noise = torch.from_numpy(idctn(spectrum, axes=(2, 3), norm="ortho"))
    start = 0.4 * estimate + 0.6 * noise
    last = ft.Plan.parse("H1A1", shift=model.shift)
    found = infos[2]
    v0 = (found.x - start) / (found.t - 0.4)  # Heun's mean velocity
    assert last.letters == "HA"
    assert v0.abs().max() < 100
    a, b = (velocity(model, start, 0.4, prompts, 2.0), None)
    b = velocity(model, start + (found.t - 0.4) * a, found.t, prompts, 2.0)
    assert_close(v0, (a + b) / 2, 1e-4)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        (dict(enlarge="pixel"), TypeError, "enlarge must be 'latents', 'pixels', a callable"),
        (dict(enlarge=("pixels", F.interpolate)), ValueError, r"must be \('latents', a callable\)"),
        (dict(enlarge=lambda x: x[0]), ValueError, r"return images of shape \(2, 3, height, width"),
        (dict(enlarge=lambda x: 3), ValueError, "return images of .*, got int"),
        (
            dict(enlarge=("latents", lambda x, size: x)),
            ValueError,
            r"return latents of shape \(2, 4, 16, 16\), got \(2, 4, 8, 8\)",
        ),
        (dict(batch_size=(2, 2, 2)), ValueError, r"one for each of the 2 stages, got \(2, 2, 2\)"),
        (dict(batch_size=(2, 0)), ValueError, "batch_size must be at least 1, got 0"),
        (dict(batch_size="2"), TypeError, "batch_size must be a whole number"),
        (dict(plan="A2 at 1/2 + H1R1 from 0.5"), ValueError, "plan H1R1 has refiner steps"),
    ],
)
def test_arguments_that_do_not_fit(models, options, kind, message):
    options = {"plan": TWO, "seed": 0, "guidance": 2.0, **options}
    with pytest.raises(kind, match=message):
        ft.sample(models["sd3"], labels=conditioning("sd3"), **options)


def test_what_takes_no_stages():
    digits, noise = tiny_model(), torch.zeros(1, 3)
    for run in (lambda: ft.sample(digits, TWO, [1]), lambda: ft.compile(digits, TWO)):
        with pytest.raises(ValueError, match="has stages, which need a model of any size"):
            run()
    with pytest.raises(ValueError, match="has stages: sample, compile and sample_stages take such"):
        ft.edit(digits, TWO, torch.zeros(1, *digits.latent_shape), 1)
    with pytest.raises(ValueError, match=r"noise must have shape .* for a plan with stages"):
        ft.sample(lambda x, t: x, TWO, noise=noise)
    with pytest.raises(ValueError, match="enlarge in pixels needs a model with a vae"):
        ft.sample(lambda x, t: x, TWO, noise=torch.zeros(1, 1, 4, 4), enlarge="pixels")
    with pytest.raises(ValueError, match="plan must end at 1"):
        ft.sample(digits, ft.Plan.parse("A2").between(0, 0.5), [1])


def test_stages_with_refiner_steps_and_guidance_in_an_interval():
    model = model_of("sd3", refined=True)
    prompts = conditioning("sd3")
    interval = ft.Plan.parse("E2", guidance_interval=(0.0, 0.5))
    plan = ft.StagedPlan((ft.Stage("H1R1", "1/2"), ft.Stage(interval, start=0.6)))
    found = ft.sample(model, plan, prompts, seed=0, guidance=3.0)
    for other in ("H1P1 at 1/2 + E2 from 0.6", "H1R1 at 1/2 + E2 from 0.6"):
        assert not torch.allclose(found, ft.sample(model, other, prompts, seed=0, guidance=3.0))


def test_the_shift_follows_the_number_of_tokens():
    for kind, pipeline in (("sd3", sd3), ("flux", flux)):
        model = ft.from_pipeline(pipeline(), image_size=64)
        assert model.shift_at(32, 32) == model.shift
        for side in (8, 16):
            stock = ft.from_pipeline(pipeline(), image_size=2 * side).shift
            expected = stock if kind == "flux" else stock * side / 32
            assert model.shift_at(side, side) == pytest.approx(expected)
            assert model.shift_at(side, 4 * side) == pytest.approx(
                model.shift_at(2 * side, 2 * side)
            )


@pytest.mark.parametrize("kind, guidance", [("sd3", 2.0), ("flux", 1.0)])
def test_the_price_is_what_the_products_of_the_networks_cost(models, kind, guidance):
    """But for prompts, five tokens of which are at every size, and attention."""

    def operations(plan: str) -> int:
        with FlopCounterMode(display=False) as counter:
            ft.sample(models[kind], plan, conditioning(kind), seed=0, guidance=guidance)
        return counter.get_total_flops()

    whole = operations("A7")
    for text in (TWO, "A4 at 1/2 + A3 from 0.6", "A4 at 1/2 to 0 + E1 from 0.2"):
        price = ft.StagedPlan.parse(text).price
        assert operations(text) / whole == pytest.approx(price / 7, rel=0.15)
