"""Plans of any text and files of any bytes: a plan or a ValueError in words."""

import json

import pytest
from fuzzing import CHANGES, JSON, LONG, SHORT, changed, refusal, watched
from hypothesis import example, given
from hypothesis import strategies as st

from flowturbo import Plan
from flowturbo.solver.plan import MAX_STEPS, as_plan
from flowturbo.solver.stages import Stage, StagedPlan, load_plan
from flowturbo.solver.steps import STEPS

LETTERS = "".join(STEPS)
COUNTS = st.sampled_from(["", "1", "7", "0", "00", "1000", "1001", "-1", "9" * 40, "1e3", "²", "٣"])
TEXTS = st.one_of(
    st.lists(st.tuples(st.sampled_from(LETTERS), COUNTS), max_size=9).map(
        lambda runs: "".join(letter + count for letter, count in runs)
    ),
    st.text(alphabet=LETTERS + LETTERS.lower() + "0123456789 ,-.\n\x00é", max_size=30),
    st.text(max_size=30),
    st.text(alphabet="HE1", min_size=2000, max_size=2100),
)
NUMBERS = st.floats() | st.integers() | st.sampled_from([True, "1", None, 10**400, 1j, [0.0]])


def plan_of(make):
    """The plan that this makes, or None if it is refused."""
    plans: list[Plan] = []
    message = refusal((ValueError, TypeError), lambda: plans.append(make()))
    if message is not None:
        assert 0 < len(message) < 10_000
        return None
    [plan] = plans
    assert 1 <= len(plan) <= MAX_STEPS
    assert all(a < b for a, b in zip(plan.grid, plan.grid[1:], strict=False))
    assert plan.cost.predictor + plan.cost.refiner >= 1
    return plan


def any_text(text):
    plan = plan_of(lambda: Plan.parse(text))
    if plan is not None:
        assert plan_of(lambda: Plan.parse(str(plan))) == plan
    if not text.endswith(".json"):
        assert plan_of(lambda: as_plan(text)) == plan


WORDS = ["at", "from", "to", "+", "1/2", "0.6", ".5", "1", "0", "1e-9", "1e-999999999", "1/0", "-1"]
WORDS += ["9" * 400, "1/" + "9" * 400, "0/1", "A4", "A3", "H1P2", "x.json", "", "\n", "½", "at+"]
STAGE_TEXTS = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
    st.tuples(*[st.sampled_from(WORDS)] * 2).map(lambda w: f"A4 at {w[0]} + A3 from {w[1]}"),
    st.tuples(*[st.sampled_from(WORDS)] * 2).map(lambda w: f"A4 to {w[0]} at .5 + A3 from {w[1]}"),
)


def any_stages(text):
    plans: list[StagedPlan] = []
    message = refusal(ValueError, lambda: plans.append(StagedPlan.parse(text)))
    if message is not None:
        assert 0 < len(message) < 10_000
        return
    [plan] = plans
    assert StagedPlan.parse(str(plan)) == plan
    assert all(stage.start > 0 for stage in plan.stages)
    assert plan.price > 0
    assert sum(map(len, plan.plans)) == len(plan)


@SHORT
@given(STAGE_TEXTS)
@example("A4 at 1e-999999999 + A3 from 0.6")
@example("A4 at 1e-320 + A3 from 0.6")
@example("A4 at 1e-7 + A3 from 0.6")
def test_any_stages(text):
    any_stages(text)


@pytest.mark.slow
@LONG
@given(STAGE_TEXTS)
def test_any_stages_at_length(text):
    any_stages(text)


def any_numbers(text, grid, shift, interval):
    plan_of(lambda: Plan.parse(text, grid=grid, guidance_interval=interval))
    plan_of(lambda: Plan.parse(text, shift=shift, guidance_interval=interval))
    plan_of(lambda: Plan.parse("H1P2").starting_at(shift))


NUMBER_LISTS = st.lists(NUMBERS, max_size=5) | st.just([0.0, 0.5, 1.0]) | NUMBERS


@SHORT
@given(TEXTS)
def test_any_text(text):
    any_text(text)


@SHORT
@given(TEXTS, NUMBER_LISTS, NUMBERS, NUMBER_LISTS)
def test_any_numbers(text, grid, shift, interval):
    any_numbers(text, grid, shift, interval)


@pytest.mark.slow
@LONG
@given(TEXTS, NUMBER_LISTS, NUMBERS, NUMBER_LISTS)
def test_any_text_and_numbers_at_length(text, grid, shift, interval):
    any_text(text)
    any_numbers(text, grid, shift, interval)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    path = tmp_path_factory.mktemp("stages") / "a.json"
    second = Stage(Plan("HPL", (0.0, 0.2, 0.5, 1.0), weights=((1.5, -0.5),)), 1, 0.6)
    StagedPlan((Stage("A4", "1/2"), second)).save(path, about={"seed": 1})
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "a.json"
    plan = Plan("HPLM", (0.0, 0.2, 0.5, 0.75, 1.0), (0.1, 0.9), weights=((1.5, -0.5), (1.0,)))
    plan.save(path, about={"seed": 1, "note": "ü"})
    return path


def loads(path, data):
    path.write_bytes(data)
    message = refusal(ValueError, lambda: load_plan(path))
    if message is not None:
        assert str(path) in message
        return
    plan = load_plan(path)
    plan.save(path.with_name("again.json"))
    assert load_plan(path.with_name("again.json")) == plan


def run_files(path, kind):
    data = path.read_bytes()
    entries = json.loads(data)
    places = [*entries, "new"]

    @kind
    @given(CHANGES)
    def bytes_changed(changes):
        loads(path.with_name("b.json"), changed(data, changes))

    @kind
    @given(st.sampled_from(places), JSON | NUMBER_LISTS | TEXTS)
    def entries_changed(name, value):
        try:
            text = json.dumps({**entries, name: value})
        except (TypeError, ValueError):  # no JSON
            return
        loads(path.with_name("b.json"), text.encode(errors="surrogatepass"))

    @kind
    @given(st.integers(0, 1), st.sampled_from(STAGE_PLACES), JSON | NUMBERS | STAGE_TEXTS)
    @example(1, ("plan",), {})
    @example(1, ("plan", "grid"), None)
    @example(0, ("plan",), "a.json")
    @example(0, ("size",), "1e-999999999")
    def stages_changed(number, place, value):
        stages = json.loads(json.dumps(entries["stages"]))
        inner = stages[number]
        if len(place) == 2:
            inner = inner["plan"] if isinstance(inner["plan"], dict) else {}
        inner[place[-1]] = value
        try:
            text = json.dumps({**entries, "stages": stages})
        except (TypeError, ValueError):  # no JSON
            return
        loads(path.with_name("b.json"), text.encode(errors="surrogatepass"))

    bytes_changed()
    entries_changed()
    if "stages" in entries:
        stages_changed()


STAGE_PLACES = [("plan",), ("size",), ("start",), ("end",), ("new",)]
STAGE_PLACES += [("plan", name) for name in ("plan", "grid", "guidance_interval", "weights", "new")]


def test_plan_files(saved):
    run_files(saved, SHORT)


def test_files_of_stages(staged):
    run_files(staged, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["saved", "staged"])
def test_plan_files_at_length(file, request):
    run_files(request.getfixturevalue(file), LONG)


def test_a_file_of_stages_names_no_other_file(staged):
    """So whoever sends one can't choose what else is read."""
    entries = json.loads(staged.read_text())
    Plan.parse("A4").save(staged.with_name("other.json"))
    entries["stages"][0]["plan"] = str(staged.with_name("other.json"))
    staged.with_name("b.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"b\.json is no file of a plan with stages"):
        load_plan(staged.with_name("b.json"))


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b"", b"null", b"1" * 5000, b" " * 2**21],
    ids=["deep lists", "deep mappings", "UTF-16", "nothing", "null", "a long number", "too long"],
)
def test_files_that_are_no_plans(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with watched(), pytest.raises(ValueError, match=r"a\.json is no plan file"):
        Plan.load(tmp_path / "a.json")
