"""The demo of a model whose file names its classes and holds plans and a guidance scale."""

from __future__ import annotations

import json

import named_model
import pytest
from named_model import GUIDANCE, NAMES, PLANS

import flowturbo as ft
from flowturbo.cli import demo
from flowturbo.cli.demo import Demo, plans_for
from flowturbo.cli.main import main
from flowturbo.demo import html
from flowturbo.demo.session import DemoSession, Request

WITHOUT_REFINER = ("H8", "H1P5", "E8", "A8")
ASKED = Request("default", "fast", "cycle", 4, seed=7, guidance=1.5)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return named_model.write(tmp_path_factory.mktemp("named") / "m.safetensors")


@pytest.fixture
def session(file):
    model = ft.load(file, device="cpu")
    session = DemoSession(model, plans_for(Demo(), model))
    yield session
    session.close()


def test_the_models_own_plans_are_offered_first_its_default_before_all(file, tmp_path):
    model = ft.load(file, device="cpu")
    offered = plans_for(Demo(), model)
    assert list(offered) == ["default", "best, so far", "fast", *WITHOUT_REFINER]
    assert {name: offered[name] for name in PLANS} == PLANS
    assert {offered[name] for name in WITHOUT_REFINER} == {None}
    assert plans_for(Demo(plans=("E4", "fast")), model) == {"E4": None, "fast": PLANS["fast"]}
    with pytest.raises(ValueError, match="plan must look like") as error:
        plans_for(Demo(plans=("fats",)), model)
    assert "fast (E2, 2 calls)" in str(error.value)


def test_plans_that_the_page_cannot_run_are_not_offered(tmp_path):
    plans = {
        "refined": ft.Plan.parse("E1R2"),
        "long": ft.Plan.parse("E65"),
        "staged": ft.StagedPlan.parse("A4 at 1/2 + A3 from 0.6"),
        "short": ft.Plan.parse("E3"),
    }
    path = named_model.write(
        tmp_path / "m.safetensors", plans=named_model.contents(tmp_path, plans)
    )
    offered = plans_for(Demo(), ft.load(path, device="cpu"))
    assert list(offered) == ["short", *WITHOUT_REFINER]


def test_images_are_those_of_the_plans_and_have_the_names_of_their_classes(session):
    shown = list(session.sample(ASKED))[-1]
    assert shown.names == list(NAMES[:4])
    for side, name in ((shown.a, "default"), (shown.b, "fast")):
        expected = ft.sample(
            session.model, PLANS[name], range(4), guidance=1.5, seed=7, output="uint8"
        )
        assert side.images.equal(expected)
    page = html.side("A", shown.a, shown.names)
    assert [f"<figcaption>{name}</figcaption>" in page for name in NAMES] == [True] * 4 + [
        False
    ] * 2
    one = list(session.sample(ASKED._replace(classes=5)))[-1]
    assert one.names == ["hot dog"] * 4


def test_names_are_text_on_the_page(session):
    shown = list(session.sample(ASKED._replace(images=1)))[-1]
    page = html.side("A", shown.a, ['<img src="x">&'])
    assert "<figcaption>&lt;img src=&quot;x&quot;&gt;&amp;</figcaption>" in page
    assert '<img src="x">' not in page


def test_the_digits_keep_their_numbers():
    session = DemoSession(ft.load("digits", device="cpu"), {"E2": None})
    assert list(session.sample(ASKED._replace(plan_a="E2", plan_b="E2")))[-1].names == [
        f"class {k}" for k in range(4)
    ]
    session.close()


def choices(page, elem_id):
    """The choices of a control of the page, with their values, and the value at the start."""
    control = next(
        part["props"]
        for part in page.get_config_file()["components"]
        if part["props"].get("elem_id") == elem_id
    )
    return control.get("choices"), control["value"]


def test_the_page_has_a_choice_of_names(session):
    pytest.importorskip("gradio")
    from flowturbo.demo.page import page

    built = page(session, 2.25)
    rules = [("each in turn", "cycle"), ("random", "random")]
    offered, value = choices(built, "class")
    assert list(map(tuple, offered)) == [*rules, *((name, k) for k, name in enumerate(NAMES))]
    assert value == "cycle"
    assert choices(built, "plan-a")[1] == "default"
    assert choices(built, "plan-b")[1] == "best, so far"
    assert choices(built, "guidance")[1] == 2.25
    digits = DemoSession(ft.load("digits", device="cpu"), {"E2": None})
    offered, _ = choices(page(digits, 1.5), "class")
    assert list(map(tuple, offered)) == [*rules, *((str(k), k) for k in range(10))]
    digits.close()


@pytest.mark.parametrize("flags, guidance", [([], GUIDANCE), (["--guidance", "3"], 3.0)])
def test_the_page_starts_with_the_recommended_guidance(file, flags, guidance, monkeypatch):
    pytest.importorskip("gradio")
    served = []
    monkeypatch.setattr(demo, "serve", lambda *_, **options: served.append(options))
    assert main(["demo", "--port", "0", "--model", str(file), *flags]) == 0
    assert json.dumps(served) == json.dumps([{"guidance": guidance, "browser": False}])
