"""Evaluation of plans on a small random model: right figures, resumable, nothing half-written; and
the velocity of known fields.
"""

import cmath
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CONFIG, random_sit

import flowturbo as ft
import flowturbo.evaluation.quality as module
from flowturbo.data.latents import digits
from flowturbo.evaluation import velocity
from flowturbo.evaluation.digit_classifier import train_classifier
from flowturbo.evaluation.metrics import frechet_distance, rms_distance
from flowturbo.evaluation.quality import PLANS, Evaluate, evaluate, plot_quality
from flowturbo.evaluation.quality_report import quality_table
from flowturbo.evaluation.statistics import family, jackknife_error, judge
from flowturbo.evaluation.velocity import InspectVelocity, inspect_velocity, trajectory_velocities
from flowturbo.models.checkpoint import save_sit
from flowturbo.storage.files import CheckpointError

DIGITS = replace(CONFIG, hidden=16, depth=3, heads=2, channels=1)
PLANS_HERE = ("H1R1", "E2", "H20")
NAMES = {"quality.json", "quality.md", "quality.png", "fine.safetensors"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = folder / "predictor.safetensors", folder / "refiner.safetensors"
    save_sit(paths[0], random_sit(DIGITS, 0))
    save_sit(paths[1], random_sit(DIGITS.refiner(), 1))
    return paths


def settings(models, out: Path, **changes) -> Evaluate:
    few = dict(
        images=25, batch_size=10, reference_images=21, reference_plan="H20", classifier_steps=10
    )
    these = dict(
        plans=PLANS_HERE, device="cpu", out=out, model=str(models[0]), refiner=str(models[1])
    )
    return Evaluate(**{**few, **these, **changes})


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("measured") / "new" / "folder"
    assert evaluate(settings(models, out)) == out / "quality.md"
    return out


def read(out: Path) -> dict:
    return json.loads((out / "quality.json").read_text())


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(module, "plot_quality", lambda results, path: path.write_bytes(b"a plot"))


def test_files(measured):
    assert {path.name for path in measured.iterdir()} == NAMES
    with Image.open(measured / "quality.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 600
    assert 0.001 < (pixels < 128).mean() < 0.3  # neither empty nor black


def test_calls_and_costs(measured):
    rows = {row["plan"]: row for row in read(measured)["rows"]}
    assert set(rows) == set(PLANS_HERE)
    ratio = DIGITS.refiner().macs() / DIGITS.macs()
    assert 0.3 < ratio < 0.5
    for plan, predictor, refiner in (("E2", 2, 0), ("H1R1", 2, 2), ("H20", 40, 0)):
        row = rows[plan]
        assert (row["predictor_calls"], row["refiner_calls"]) == (predictor, refiner)
        assert row["cost"] == pytest.approx(predictor + ratio * refiner, rel=1e-12)
        assert row["ms_per_image"] > 0
    assert rows["H20"]["ms_per_image"] > 5 * rows["E2"]["ms_per_image"]


def test_figures_are_those_of_the_plans_images(measured, models):
    """Measured again from images made in one batch."""
    model = ft.load(models[0], models[1], device="cpu")
    labels, noise = [i % 10 for i in range(25)], ft.noise((1, 8, 8), 0, range(25))
    classifier, test = train_classifier(digits(), steps=10), digits("test")
    held_out = classifier.read(test.mean)[0]
    results = read(measured)
    images = {
        plan: ft.sample(model, plan, labels, noise=noise, guidance=1.5) for plan in PLANS_HERE
    }
    for row in results["rows"]:
        x = images[row["plan"]]
        features, classes = classifier.read(x)
        assert row["frechet"] == pytest.approx(frechet_distance(features, held_out), rel=1e-3)
        assert row["frechet_first"] == pytest.approx(
            frechet_distance(features[:21], held_out), rel=1e-3
        )
        assert row["label_share"] == float((classes == torch.tensor(labels)).double().mean())
        assert row["rms"] == pytest.approx(
            rms_distance(x[:21], images["H20"][:21]), rel=1e-3, abs=1e-12
        )
        # 21 images in ten blocks: the first of three, the others of two
        assert row["rms_blocks"][0] == pytest.approx(
            rms_distance(x[3:21], images["H20"][3:21]), rel=1e-3, abs=1e-12
        )
        assert row["rms_blocks"][9] == pytest.approx(
            rms_distance(x[:19], images["H20"][:19]), rel=1e-3, abs=1e-12
        )
        assert row["frechet_blocks"][9] == pytest.approx(
            frechet_distance(features[:23], held_out), rel=1e-3
        )
    assert results["classifier"] == {
        "held_out_accuracy": classifier.accuracy(test),
        "held_out_images": len(test),
    }
    floor = frechet_distance(classifier.read(digits().mean)[0], held_out)
    assert results["floor"] == {"frechet": pytest.approx(floor, rel=1e-9), "images": len(digits())}
    assert results["fine"]["images"] == 21


def test_fine_solution_is_at_no_distance_from_itself(measured):
    """To the last bit, although the table's images come in other batches."""
    results = read(measured)
    rows = {row["plan"]: row for row in results["rows"]}
    assert rows["H20"]["rms"] == 0
    assert rows["H20"]["frechet_first"] == results["fine"]["frechet"]
    assert rows["E2"]["rms"] > 1e-3
    assert rows["H1R1"]["rms"] > 1e-3


def test_table(measured):
    text = (measured / "quality.md").read_text()
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    main = [line for line in cells if len(line) == 9 and line[0] in PLANS_HERE]
    assert [line[0] for line in main] == ["E2", "H1R1", "H20"]  # by cost
    assert [line[1] for line in main] == ["Euler", "FlowTurbo", "Heun"]
    assert [line[2:4] for line in main] == [["2", "0"], ["2", "2"], ["40", "0"]]
    assert main[2][6] == "**0.0000**"
    results = read(measured)
    accuracy, floor = results["classifier"]["held_out_accuracy"], results["floor"]["frechet"]
    assert f"recognises {accuracy:.1%} of them" in text
    assert f"The 1438 training digits are at {floor:.2f}" in text
    assert f"{results['environment']['device']}, threads: {torch.get_num_threads()}" in text
    assert "H1R1" in text.split("## Plans with refiner steps")[1]


def test_time_is_the_median_without_the_first_batch(models, tmp_path, monkeypatch, no_plot):
    """Of five batches of 10 images, the last half full: 100, 1, 7, 2 and 4 seconds by this
    clock.
    """
    now, seconds = [0.0], [100.0, 1.0, 7.0, 2.0, 4.0]

    def sample(model, plan, labels, *, noise, **others):
        assert (
            others["batch_size"] == 10
        )  # the last batch costs as much as a full one; bits can be those of the fine solution
        if str(plan) == "E1":
            now[0] += seconds.pop(0)
        return noise

    monkeypatch.setattr(module, "sample", sample)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    evaluate(settings(models, tmp_path, plans=("E1",), images=45))
    assert read(tmp_path)["rows"][0]["ms_per_image"] == 300


class Killed(BaseException):
    """Like a kill, caught by nobody."""


def kill_at(monkeypatch, victim: str) -> list[str]:
    """From now on sampling with the plan `victim` is the end, in its second batch; -> the plans
    sampled so far, a batch each.
    """
    seen: list[str] = []

    def sample(model, plan, *rest, **others):
        seen.append(str(plan))
        if str(plan) == victim and seen.count(victim) == 2:
            raise Killed
        return ft.sample(model, plan, *rest, **others)

    monkeypatch.setattr(module, "sample", sample)
    return seen


def test_killed_evaluation_goes_on(models, measured, tmp_path, monkeypatch, no_plot):
    seen = kill_at(monkeypatch, "E2")
    with pytest.raises(Killed):
        evaluate(settings(models, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"quality.json", "fine.safetensors"}
    half = read(tmp_path)
    assert [row["plan"] for row in half["rows"]] == ["H1R1"]

    seen[:] = ["E2", "E2"]  # past the kill
    evaluate(settings(models, tmp_path))
    assert (
        seen[2:] == ["E2"] * 3 + ["H20"] * 3
    )  # neither the fine solution nor the finished plan again
    whole = read(tmp_path)
    assert whole["rows"][0] == half["rows"][0]
    assert {path.name for path in tmp_path.iterdir()} == NAMES
    without_time = [
        [{k: v for k, v in row.items() if k != "ms_per_image"} for row in results["rows"]]
        for results in (whole, read(measured))
    ]
    assert without_time[0] == without_time[1]
    assert {k: v for k, v in whole.items() if k != "rows"} == {
        k: v for k, v in read(measured).items() if k != "rows"
    }


def test_kill_in_the_fine_solution_leaves_nothing(models, tmp_path, monkeypatch, no_plot):
    kill_at(monkeypatch, "H20")
    monkeypatch.setattr(module, "save_tensors", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        evaluate(settings(models, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_plans_may_be_added(models, tmp_path, monkeypatch, no_plot):
    quick = dict(reference_plan="H2")
    evaluate(settings(models, tmp_path, plans=("E2",), **quick))
    first = read(tmp_path)["rows"]
    seen = kill_at(monkeypatch, "none")
    evaluate(settings(models, tmp_path, plans=("E1", "E2"), **quick))
    assert seen == ["E1"] * 3
    rows = read(tmp_path)["rows"]
    assert [row["plan"] for row in rows] == ["E2", "E1"]
    assert rows[0] == first[0]
    (tmp_path / "quality.md").unlink()
    evaluate(
        settings(models, tmp_path, plans=("E2",), **quick)
    )  # nothing left to measure: the reports alone
    assert seen == ["E1"] * 3
    assert read(tmp_path)["rows"] == rows
    assert "| E1 |" in (tmp_path / "quality.md").read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(guidance=2.0), r"settings.guidance was 1.5 and is now 2.0"),
        (dict(seed=1), r"settings.seed was 0 and is now 1"),
        (dict(images=30), r"settings.images was 25 and is now 30"),
        (dict(refiner=None, plans=("E2",)), r"settings.refiner was '.*' and is now None"),
    ],
)
def test_other_settings_are_refused(measured, models, changes, message):
    before = {path.name: path.read_bytes() for path in measured.iterdir()}
    with pytest.raises(ValueError, match=message) as refused:
        evaluate(settings(models, measured, **changes))
    assert "choose another folder as out" in str(refused.value)
    assert {path.name: path.read_bytes() for path in measured.iterdir()} == before


def test_another_model_under_the_same_name_is_refused(models, tmp_path, no_plot):
    path = tmp_path / "predictor.safetensors"
    path.write_bytes(models[0].read_bytes())
    chosen = settings((path, models[1]), tmp_path / "out", plans=("E1",), reference_plan="H1")
    evaluate(chosen)
    save_sit(path, random_sit(DIGITS, 3))
    with pytest.raises(ValueError, match=r"model\.predictor_sha256 was"):
        evaluate(chosen)
    (chosen.out / "quality.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"fine\.safetensors belongs to an evaluation with other settings"
    ):
        evaluate(chosen)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 99, "settings": {}, "model": {}, "environment": {}}']
)
def test_foreign_results_are_refused(models, tmp_path, text):
    (tmp_path / "quality.json").write_text(text)
    with pytest.raises(ValueError, match=r"quality\.json holds no results of an evaluation"):
        evaluate(settings(models, tmp_path))
    assert (tmp_path / "quality.json").read_text() == text


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(images=0), "images must be at least 1"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(images=39, batch_size=20), r"images must be at least 2 \* batch_size = 40 .* got 39"),
        (dict(reference_images=26), "reference_images must be from 20 to images = 25, got 26"),
        (dict(reference_images=19), "reference_images must be from 20 to images = 25, got 19"),
        (dict(classifier_steps=0), "classifier_steps must be at least 1"),
        (dict(guidance=math.nan), "guidance must be finite"),
        (dict(seed=-1), "seed must be from 0"),
        (dict(plans=()), "plans must be a list of at least one plan"),
        (dict(plans="E2"), "plans must be a list of at least one plan, got 'E2'"),
        (dict(plans=("E2", "Q3")), "letters of"),
        (dict(plans=("E2", "E1E1")), "plans must differ, but 'E2' and 'E1E1' are the same"),
        (dict(plans=("R1",)), "R needs the velocity of an earlier step"),
        (dict(reference_plan="H1R1"), "reference_plan must do without the refiner, got 'H1R1'"),
    ],
)
def test_bad_settings_are_refused(models, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(models, tmp_path, **changes)


def test_models_that_do_not_fit_are_refused(models, tmp_path):
    save_sit(tmp_path / "four.safetensors", random_sit(CONFIG, 0))
    save_sit(tmp_path / "five.safetensors", random_sit(replace(DIGITS, num_classes=5), 0))
    out = tmp_path / "out"
    for name, got in (
        ("four", r"latents \(4, 8, 8\) of 10 classes"),
        ("five", r"latents \(1, 8, 8\) of 5 classes"),
    ):
        with pytest.raises(
            ValueError, match=rf"model must have latents \(1, 8, 8\) of 10 classes.*got {got}"
        ):
            evaluate(
                settings((tmp_path / f"{name}.safetensors", None), out, refiner=None, plans=("E1",))
            )
    with pytest.raises(ValueError, match="refiner must be given: of the plans, H1R1 need one"):
        evaluate(settings(models, out, refiner=None))
    assert not out.exists()


def test_missing_matplotlib_is_said_at_the_door(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"pip install 'flowturbo\[eval\]'"):
        evaluate(settings(models, out))
    with pytest.raises(ValueError, match=r"pip install 'flowturbo\[eval\]'"):
        inspect_velocity(InspectVelocity(out=out, model=str(models[0])))
    assert not out.exists()


def test_diverging_plan_is_named(models, tmp_path, monkeypatch, no_plot):
    def sample(model, plan, *rest, **others):
        return ft.sample(model, plan, *rest, **others) / (0 if str(plan) == "E2" else 1)

    monkeypatch.setattr(module, "sample", sample)
    with pytest.raises(ValueError, match="E2 gives NaN or infinity"):
        evaluate(settings(models, tmp_path, reference_plan="H2"))
    assert [row["plan"] for row in read(tmp_path)["rows"]] == ["H1R1"]


@pytest.mark.parametrize(
    "plan, name",
    [
        ("E4", "Euler"),
        ("H2", "Heun"),
        ("P3", "pseudo corrector"),
        ("H1P3", "pseudo corrector"),
        ("B4", "Adams-Bashforth"),
        ("H1A3", "Adams-Bashforth"),
        ("H1P3R2", "FlowTurbo"),
        ("H1S2", "FlowTurbo"),
        ("A3R1", "Adams-Bashforth + refiner"),
        ("E1R1", "Adams-Bashforth + refiner"),
    ],
)
def test_families(plan, name):
    assert family(ft.Plan.parse(plan)) == name


def test_default_plans_have_rivals_at_their_costs():
    plans = [ft.Plan.parse(plan) for plan in PLANS]
    assert len(set(plans)) == len(plans) == len({str(plan) for plan in plans})
    free = [plan.cost.predictor for plan in plans if not plan.cost.refiner]
    for plan in plans:
        if plan.cost.refiner:
            # A refiner call costs less than a sixth of a predictor call at 12 blocks, and no plan
            # here has more than ten.
            assert {plan.cost.predictor, plan.cost.predictor + 1} <= set(free), plan
            assert (
                sum(calls in (plan.cost.predictor, plan.cost.predictor + 1) for calls in free) >= 3
            ), plan


def row(
    plan: str,
    cost: float,
    rms: float,
    refiner_calls: int = 0,
    spread: float = 0.0,
    ms: float | None = None,
) -> dict:
    blocks = [rms + spread * (-1) ** i for i in range(10)]
    return {
        "plan": plan,
        "family": family(ft.Plan.parse(plan)),
        "predictor_calls": int(cost),
        "refiner_calls": refiner_calls,
        "cost": cost,
        "ms_per_image": cost if ms is None else ms,
        "rms": rms,
        "rms_blocks": blocks,
        "frechet": rms,
        "frechet_blocks": blocks,
        "frechet_first": rms,
        "label_share": 1.0,
    }


def test_a_plan_is_judged_against_the_best_that_is_as_cheap():
    rivals = [row("E2", 2.0, 0.5), row("E3", 3.0, 0.3), row("H1P1", 3.0, 0.4), row("E4", 4.0, 0.1)]
    mine = row("H1P1R1", 3.17, 0.2, 2)
    assert judge(mine, rivals, "rms", "cost", 3.27) == ("better", rivals[1])
    assert judge(mine, rivals, "rms", "cost", 4) == ("worse", rivals[3])
    assert judge(mine, rivals, "rms", "cost", 1.9) == ("no rival", None)
    # a cheaper plan without the refiner is a rival too
    assert judge(mine, [row("E2", 2.0, 0.15), *rivals[1:3]], "rms", "cost", 3.27)[0] == "worse"


def test_a_difference_counts_beyond_two_standard_errors():
    """The blocks of both plans swing together by 0.1, so that what counts is how the difference
    swings: by `spread`.
    """
    for gain, spread, outcome in (
        (0.05, 0.0, "better"),
        (-0.05, 0.0, "worse"),
        (0.05, 0.02, "level"),
        (-0.05, 0.02, "level"),
    ):
        mine, other = row("H1R1", 2.0, 0.5 - gain, 2, 0.1 + spread), row("E2", 2.0, 0.5, 0, 0.1)
        error = jackknife_error(
            [a - b for a, b in zip(other["rms_blocks"], mine["rms_blocks"], strict=True)]
        )
        assert error == pytest.approx(3 * spread, abs=1e-12)  # sqrt((n - 1) / n * n) spread, n = 10
        assert judge(mine, [other], "rms", "cost", 2.0)[0] == outcome


def test_jackknife_error_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(0).normal(size=10)
    without = [float(np.delete(values, i).mean()) for i in range(10)]
    assert jackknife_error(without) == pytest.approx(values.std(ddof=1) / 10**0.5, rel=1e-12)


def test_verdicts_name_winners_and_losers(measured):
    rows = [
        row("E3", 3.0, 0.3),
        row("H1P1", 3.0, 0.4),
        row("E4", 4.0, 0.1, ms=3.1),
        row("H1P1R1", 3.2, 0.2, 2),
        row("H1P2R1", 4.2, 0.15, 2, ms=2.0),
    ]
    text = quality_table({**read(measured), "rows": rows}).split("### RMS")[1].split("###")[0]
    assert "- Same cost, of 2 plans: 1 better (H1P1R1), 1 worse (H1P2R1)." in text
    assert "- Same cost, of H and P, of 2 plans: 2 better (H1P1R1, H1P2R1)." in text
    assert "- Next whole call, of 2 plans: 2 worse (H1P1R1, H1P2R1)." in text
    assert "- Same time, of 2 plans: 1 worse (H1P1R1), 1 no rival (H1P2R1)." in text
    assert (
        "| H1P1R1 | 3.20 | 0.2 | better than E3 (0.3) | better than H1P1 (0.4) | worse than E4 "
        "(0.1) | worse than E4 (0.1) |"
    ) in text


@pytest.mark.parametrize(
    "plan, said",
    [("E2", "No plan here has refiner steps."), ("H1R1", "of 1 plans: 1 no rival (H1R1).")],
)
@pytest.mark.filterwarnings("error")
def test_reports_of_one_plan(measured, tmp_path, plan, said):
    results = {
        **read(measured),
        "rows": [row for row in read(measured)["rows"] if row["plan"] == plan],
    }
    assert said in quality_table(results)
    plot_quality(results, tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert min(image.size) > 600


def handmade(predictor) -> ft.FlowModel:
    return ft.FlowModel(predictor, (1, 1, 2), 10, 10, 1, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("guidance, rate", [(1.0, 0.7), (1.5, 1.05)])
def test_velocities_are_those_at_the_states_of_the_trajectory(guidance, rate):
    """dx/dt = 0.7 x with a label, 0 without: guided by s, Heun's states grow by 1 + h + h^2/2 with
    h = 0.7 s / steps.
    """
    steps, labels, noise = 8, torch.arange(5), ft.noise((1, 1, 2), 0, range(5))
    model = handmade(lambda x, t, y, v=None: 0.7 * x * (y < 10).view(-1, 1, 1, 1))
    v = trajectory_velocities(model, ft.Plan.parse(f"H{steps}"), labels, noise, guidance)
    h = rate / steps
    expected = (
        rate
        * noise
        * torch.tensor([(1 + h + h * h / 2) ** k for k in range(steps + 1)]).view(-1, 1, 1, 1, 1)
    )
    torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-6)


def test_velocity_that_turns_at_a_known_rate(tmp_path, monkeypatch):
    """v = exp((a + iw) t): its relative change over dt is |exp((a + iw) dt) - 1|, its cosine with
    v(s) is cos w(t - s).
    """
    a, w, steps = 0.8, 2.0, 40

    def predictor(x, t, y, v=None):
        return ((a * t).exp() * torch.stack([(w * t).cos(), (w * t).sin()])).T.view(-1, 1, 1, 2)

    monkeypatch.setattr(velocity, "load", lambda *_, **__: handmade(predictor))
    path = inspect_velocity(InspectVelocity(out=tmp_path, images=7, batch_size=3, steps=steps))
    assert path == tmp_path / "velocity.png"
    assert {p.name for p in tmp_path.iterdir()} == {"velocity.json", "velocity.png"}
    with Image.open(path) as image:
        assert np.asarray(image.convert("L")).std() > 5
    results = json.loads((tmp_path / "velocity.json").read_text())
    times = np.array(results["times"])
    np.testing.assert_allclose(times, np.arange(steps + 1) / steps)
    for part, scale in (("change", 1), ("rate", steps)):
        for kind in ("mean", "p10", "p90"):
            np.testing.assert_allclose(
                results[part][kind],
                np.full(steps, scale * abs(cmath.exp((a + w * 1j) / steps) - 1)),
                rtol=1e-4,
            )
    assert list(results["cosine"]) == ["0", "0.25", "0.5", "0.75", "1"]
    for s, cosine in results["cosine"].items():
        np.testing.assert_allclose(cosine, np.cos(w * (times - float(s))), atol=1e-5)


def test_inspected_velocity_does_not_depend_on_batches(models, tmp_path, monkeypatch):
    monkeypatch.setattr(velocity, "plot_velocity", lambda *_: None)
    found = []
    for size in (3, 12):
        inspect_velocity(
            InspectVelocity(
                out=tmp_path / str(size), model=str(models[0]), images=12, batch_size=size, steps=6
            )
        )
        found.append(json.loads((tmp_path / str(size) / "velocity.json").read_text()))
    for part, kind in (("rate", "mean"), ("rate", "p90"), ("change", "p10"), ("cosine", "0")):
        np.testing.assert_allclose(found[0][part][kind], found[1][part][kind], rtol=1e-3)
    assert found[0]["rate"]["p90"][2] > found[0]["rate"]["p10"][2] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "steps must be at least 1"),
        (dict(steps=1001), "a plan must have 1 to 1000 steps"),
        (dict(images=0), "images must be at least 1"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(guidance=math.inf), "guidance must be finite"),
        (dict(seed=2**63), "seed must be from 0"),
    ],
)
def test_bad_inspections_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        InspectVelocity(**changes)


def test_a_velocity_of_zero_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        velocity, "load", lambda *_, **__: handmade(lambda x, t, y, v=None: torch.zeros_like(x))
    )
    with pytest.raises(ValueError, match="has a velocity of zero: is it trained"):
        inspect_velocity(InspectVelocity(out=tmp_path / "out", images=2, steps=3))
    assert not (tmp_path / "out").exists()
