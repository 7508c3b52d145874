"""Evaluations of a model on its training set: right figures, resumed runs, refused input."""

import json
import re
from dataclasses import replace

import pytest
import torch
from class_runs_small import (
    COUNTS,
    HELD,
    NAMES,
    THREE,
    class_double_loop,
    class_settings,
    drawn,
    write,
)
from PIL import Image
from quality_runs import Killed, read
from tiny import random_sit

import flowturbo as ft
import flowturbo.evaluation.class_quality as module
from flowturbo.data.latents import Latents
from flowturbo.evaluation import class_plot
from flowturbo.evaluation.class_plot import plot_classes
from flowturbo.evaluation.class_report import advice, class_table
from flowturbo.evaluation.class_runs import cost_of
from flowturbo.evaluation.class_shares import proportional_labels, shares_of
from flowturbo.evaluation.picture_classifier import kept_classifier
from flowturbo.evaluation.quality import evaluate
from flowturbo.models.checkpoint import save_sit
from flowturbo.solver.stages import StagedPlan

FINE = {"fine-1.0.safetensors", "fine-2.0.safetensors"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    path = tmp_path_factory.mktemp("fitted") / "mine.json"
    ft.Plan.parse("L2", grid=(0, 0.3, 1)).save(path)
    return path


@pytest.fixture(scope="module")
def whole(networks, sets, fitted, tmp_path_factory):
    """Every kind of row."""
    out = tmp_path_factory.mktemp("whole") / "new"
    settings = class_settings(
        networks,
        sets,
        out,
        plans=("E2", "H1R1", str(fitted)),
        guidance=(1.0, 2.0),
        guidance_intervals=((0.0, 1.0), (0.1, 0.45)),
        precisions=("float32", "fp8"),
    )
    assert evaluate(settings) == out / "quality.md"
    return out


def rows_of(out):
    return {(r["label"], r["guidance"]): r for r in read(out)["rows"]}


def test_rows_and_costs(whole):
    assert {path.name for path in whole.iterdir()} == NAMES | FINE
    rows = rows_of(whole)
    plans = {"E2": 1, "H1R1": 1, "mine.json": 1}
    at_two = {"E2 [0.1-0.45]": 1, "H1R1 [0.1-0.45]": 1}
    for scale, names in ((1.0, plans), (2.0, plans | at_two)):
        for name in names:
            for suffix in ("", " fp8"):
                assert rows.pop((name + suffix, scale))["guidance"] == scale
    assert not rows
    rows, share = rows_of(whole), THREE.refiner().macs() / THREE.macs()
    for scale in (1.0, 2.0):
        assert rows["E2", scale]["cost"] == 2
        assert rows["H1R1", scale]["cost"] == pytest.approx(2 + 2 * share, rel=1e-12)
    assert rows["E2 [0.1-0.45]", 2.0]["cost"] == 1  # neither 0 nor 0.5 is in the interval
    assert rows["mine.json", 2.0]["family"] == "fitted"
    assert rows["mine.json", 2.0]["record"]["grid"] == [0, 0.3, 1]
    assert rows["E2 fp8", 2.0]["precision"] == "fp8"
    assert rows["E2 fp8", 2.0]["rms"] != rows["E2", 2.0]["rms"]


def test_figures_are_those_of_the_plans_images(whole, networks, sets):
    """Measured again from images made in one batch, by formulas of their own."""
    model = ft.load(networks[0], networks[1], device="cpu")
    train, held = drawn(0, COUNTS), drawn(1, HELD)
    labels = proportional_labels(shares_of(train.labels, 3), 60)
    assert labels.bincount().tolist() == list(COUNTS)
    noise = ft.noise((3, 8, 8), 0, range(60))
    classifier = kept_classifier(whole / "classifier.safetensors", train, 5)
    fine = ft.sample(model, "C5", labels[:30], noise=noise[:30], guidance=2)
    plan = ft.Plan.parse("E2", guidance_interval=(0.1, 0.45))
    for name, steps in (("E2", "E2"), ("H1R1", "H1R1"), ("E2 [0.1-0.45]", plan)):
        row = rows_of(whole)[name, 2.0]
        x = ft.sample(model, steps, labels, noise=noise, guidance=2)
        features, classes = classifier.read(x)
        difference = (x[:30] - fine).double()
        assert row["rms"] == pytest.approx(float(difference.square().mean().sqrt()), rel=1e-4)
        assert row["rms_blocks"][0] == pytest.approx(
            float(difference[3:].square().mean().sqrt()), rel=1e-4
        )
        assert row["label_share"] == float((classes == labels).double().mean())
        shares = torch.tensor(COUNTS, dtype=torch.float64) / 60
        for data, key in ((train, "kid"), (held, "kid_held")):
            read_too = classifier.read(data.mean)[0]
            expected = class_double_loop(features, labels, read_too, data.labels, shares)
            assert row[key] == pytest.approx(expected, rel=1e-3), key
        every = torch.cat([train.mean, train.mean.flip(3)]).double().flatten(1)
        distances = torch.cdist(x.double().clamp(-1, 1).flatten(1), every) / 192**0.5
        near = distances.min(1).values
        assert row["nearest"]["0.5"] == pytest.approx(float(near.median()), rel=0.02)
        assert row["nearest"]["0.01"] == pytest.approx(float(near.quantile(0.01)), rel=1e-4)
    unguided = (ft.sample(model, p, labels[:30], noise=noise[:30]) for p in ("E2", "C5"))
    expected = float(torch.sub(*unguided).double().square().mean().sqrt())
    assert rows_of(whole)["E2", 1.0]["rms"] == pytest.approx(expected, rel=1e-4)
    found = read(whole)["references"]
    assert found["held_out_accuracy"] == classifier.accuracy(held)
    assert (found["training_images"], found["held_out_images"]) == (60, 30)


def test_report(whole):
    text = (whole / "quality.md").read_text(encoding="utf-8")
    accuracy = read(whole)["references"]["held_out_accuracy"]
    assert f"it recognises {accuracy:.1%} of 30 held-out pictures" in text
    parts = re.split(r"^## ", text, flags=re.M)
    assert [part.split("\n")[0] for part in parts[1:]] == [
        *("Guidance 1", "Guidance 2", "Guidance scales")
    ]
    for part in parts[1:3]:
        titles = re.findall(r"^### (.*)", part, flags=re.M)
        assert titles == [
            *("Which plan to take", "All plans", "Other precisions"),
            *("Against the best that costs no more", "Plans with refiner steps"),
        ]
        for table in re.findall(r"(?:^\|.*\n)+", part, flags=re.M):
            widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.strip().split("\n")}
            assert len(widths) == 1, table
    with Image.open(whole / "quality.png") as image:
        assert min(image.size) > 600


def test_any_name_of_a_plan_can_be_shown(whole, tmp_path, monkeypatch):
    """matplotlib would set the first as a formula, which it is not; the second has a column's bar.

    One is above the plot, where it has no error bar either.
    """
    results = read(whole)
    for row, label in zip(results["rows"], (r"$\frac$", "a|b", r"$\bad{$"), strict=False):
        row |= {"label": label, "guidance": 1.0, "precision": results["precision"]}
    results["rows"] = results["rows"][:3]
    results["rows"][2] |= {"frechet": 1e9, "kid": 1e9, "rms": 1e9}
    barred, bars = [], class_plot._error_bars
    monkeypatch.setattr(class_plot, "_error_bars", lambda *a: [barred.append(a[1:]), bars(*a)])
    plot_classes(results, tmp_path / "a.png")
    assert len(barred) == 3
    assert all(row[key] < 1e9 for rows, key in barred for row in rows)
    lines = [line for line in class_table(results).split("\n") if "a\\|b" in line]
    assert len(lines) >= 3
    for text in (class_table(results), "\n".join(lines)):
        assert not re.search(r"[^\\]\|b", text)


def test_report_says_which_plan_to_take():
    def row(plan, cost, rms, spread=0.0):
        blocks = {"rms_blocks": [rms + spread * (-1) ** i for i in range(10)]}
        return {"plan": plan, "label": plan, "cost": cost, "rms": rms, **blocks}

    rows = [row("E2", 2, 0.5), row("A2", 2, 0.4, 0.02), row("H2", 4, 0.45), row("A4", 4, 0.2)]
    lines = [line for line in advice(rows) if line.startswith("|")][2:]
    assert lines == ["| 2.00 | A2 0.4000 ± 0.0600 (E2) |", "| 4.00 | A4 0.2000 ± 0.0000 |"]


def test_report_without_held_out_pictures(networks, sets, tmp_path, no_class_plot):
    evaluate(class_settings(networks, sets, tmp_path, held_out=None, reference_plan="E2"))
    results = read(tmp_path)
    assert "kid_held" not in results["rows"][0]
    assert "its accuracy is not known" in class_table(results)


def test_killed_evaluation_goes_on_after_the_last_batch(
    networks, sets, whole, tmp_path, monkeypatch, no_class_plot
):
    seen = []

    def dying(after):
        def sample(model, plan, *rest, **others):
            if len(seen) == after:
                raise Killed
            seen.append(str(plan))
            return ft.sample(model, plan, *rest, **others)

        return sample

    for after in (1, 4, 6, 99):  # in the fine solution, in E2, in H1R1, never
        monkeypatch.setattr(module, "sample", dying(after))
        settings = class_settings(networks, sets, tmp_path, guidance=2.0)
        if after == 99:
            evaluate(settings)
        else:
            with pytest.raises(Killed):
                evaluate(settings)
    assert seen == ["C5"] * 2 + ["E2"] * 3 + ["H1R1"] * 3
    assert {path.name for path in tmp_path.iterdir()} == NAMES | {"fine-2.0.safetensors"}
    for row in read(tmp_path)["rows"]:
        other = rows_of(whole)[row["label"], 2.0]
        assert {k: v for k, v in row.items() if k != "ms_per_image"} == {
            k: v for k, v in other.items() if k != "ms_per_image"
        }


def test_rows_may_be_added(networks, sets, tmp_path, monkeypatch, no_class_plot):
    quick = dict(reference_plan="E2", held_out=None)
    evaluate(class_settings(networks, sets, tmp_path, plans=("E1",), guidance=2.0, **quick))
    first = read(tmp_path)["rows"]
    monkeypatch.setattr(
        "flowturbo.evaluation.picture_classifier.train_picture_classifier",
        lambda *_, **__: pytest.fail("trained again"),
    )
    more = dict(plans=("A2", "E1"), guidance=(1.0, 2.0), precisions=("float32", "bfloat16"))
    evaluate(class_settings(networks, sets, tmp_path, **more, **quick))
    rows = read(tmp_path)["rows"]
    assert rows[0] == first[0]
    assert len(rows) == len(rows_of(tmp_path)) == 8
    before = (tmp_path / "quality.json").read_bytes()
    evaluate(class_settings(networks, sets, tmp_path, plans=("E1",), **quick, guidance=2.0))
    assert (tmp_path / "quality.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"settings\.images was 60 and is now 80"):
        evaluate(class_settings(networks, sets, tmp_path, images=80, **quick))


def test_cost_of_stages_and_intervals():
    staged = StagedPlan.parse("H1R1 at 1/2 + A3 from 0.6")
    assert cost_of(staged, 0.25, False) == pytest.approx((2 + 2 * 0.25) / 4 + 3)
    assert cost_of(staged, 0.25, True) == cost_of(staged, 0.25, False)
    inside = ft.Plan.parse("E4", guidance_interval=(0.2, 0.6))  # calls at 0, 1/4, 1/2, 3/4
    assert cost_of(inside, 0.25, True) == 3
    assert cost_of(inside, 0.25, False) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data=None), "held_out needs data"),
        (dict(data=None, held_out=None, precisions=("fp8",)), "precisions needs data"),
        (dict(data=None, held_out=None, guidance=(1, 2)), "guidance must be one scale without"),
        (dict(guidance=(2, 2.0)), "none twice"),
        (dict(precisions=("int8",)), "precisions must be of float32, bfloat16, fp8, got int8"),
        (dict(precisions=("fp8", "fp8")), "precisions must differ"),
        (dict(guidance_intervals=((0.5, 0.2),)), "guidance_interval must be"),
        (dict(plans=()), "plans must be a list of at least one plan"),
        (dict(plans="E2"), "plans must be a list of at least one plan, got 'E2'"),
    ],
)
def test_bad_settings_are_refused(networks, sets, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        class_settings(networks, sets, tmp_path, **changes)


def test_data_that_does_not_fit_is_refused(networks, sets, tmp_path):
    data = drawn(0, COUNTS)
    wrong = {
        "wide": (Latents(data.mean[:, :, :, :4], data.labels), r"data must be of the model's form"),
        "classes": (Latents(data.mean, data.labels + 1), r"got \(3, 8, 8\) of 4"),
        "scaled": (Latents(2 * data.mean, data.labels), "pixels in \\[-1, 1\\], got values up to"),
    }
    out = tmp_path / "out"
    for name, (latents, message) in wrong.items():
        source = write(tmp_path / f"{name}.npz", latents)
        with pytest.raises(ValueError, match=message):
            evaluate(class_settings(networks, (source, None), out))
    only = write(tmp_path / "two.npz", drawn(0, (9, 9)))
    with pytest.raises(ValueError, match="held_out has classes that data lacks: 2"):
        evaluate(class_settings(networks, (only, sets[1]), out))
    with pytest.raises(ValueError, match="refiner must be given: of the plans, H1R1 need one"):
        evaluate(class_settings((networks[0], None), sets, out, refiner=None))
    for plans, message in (
        (("nowhere.json",), r"nowhere\.json can't be read"),
        (("E2", "E1E1"), "plans must differ, but 'E2' and 'E1E1' are the same"),
        (("E2 at 1/2 + E2 from 0.5",), "has stages, which need a model of any size"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(class_settings(networks, sets, out, plans=plans))
    many = write(tmp_path / "many.npz", drawn(0, (1, 1, 1)))
    with pytest.raises(ValueError, match="images must be enough for several of a class"):
        evaluate(class_settings(networks, (many, None), out))
    assert not out.exists()


def test_plans_of_the_default_fit_the_model(networks, sets, tmp_path):
    settings = class_settings(networks, sets, tmp_path, plans=None)
    model = ft.load(*networks, device="cpu")
    with_refiner, without = settings.chosen(model), settings.chosen(replace(model, refiner=None))
    assert {plan.cost.refiner > 0 for _, plan in with_refiner} == {True, False}
    assert without == [pair for pair in with_refiner if not pair[1].cost.refiner]


def test_stages_and_plans_by_name(networks, sets, tmp_path, no_class_plot):
    """Of a model that was trained at two sizes, with a plan of its own."""
    path = tmp_path / "two.safetensors"
    ft.Plan.parse("L2", grid=(0, 0.4, 1)).save(tmp_path / "fast.json")
    fast = json.loads((tmp_path / "fast.json").read_text(encoding="utf-8"))
    save_sit(path, random_sit(replace(THREE, sides=(4,)), 0), plans={"fast": fast})
    staged = "A2 at 1/2 + A2 from 0.6"
    settings = class_settings(
        (path, None),
        sets,
        tmp_path / "out",
        refiner=None,
        plans=(staged, "fast"),
        guidance=2.0,
        guidance_intervals=((0.2, 0.8),),
    )
    evaluate(settings)
    rows = rows_of(tmp_path / "out")
    assert set(rows) == {(staged, 2.0), ("fast", 2.0)}
    assert (rows["fast", 2.0]["family"], rows["fast", 2.0]["cost"]) == ("fitted", 2)
    row = rows[staged, 2.0]
    assert (row["family"], row["predictor_calls"], row["cost"]) == ("stages", 4, 2.5)
    model, train = ft.load(path, device="cpu"), drawn(0, COUNTS)
    labels = proportional_labels(shares_of(train.labels, 3), 30)
    noise = ft.noise((3, 8, 8), 0, range(30))
    x, fine = (ft.sample(model, p, labels, noise=noise, guidance=2) for p in (staged, "C5"))
    expected = float((x - fine).double().square().mean().sqrt())
    assert row["rms"] == pytest.approx(expected, rel=1e-4)
