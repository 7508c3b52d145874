"""Plans of any text and files of any bytes: a plan or a ValueError in words."""

import json

import pytest
from fuzzing import CHANGES, JSON, LONG, SHORT, changed, refusal, watched
from hypothesis import given
from hypothesis import strategies as st

from flowturbo import Plan
from flowturbo.solver.plan import MAX_STEPS, as_plan
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
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "a.json"
    plan = Plan("HPLM", (0.0, 0.2, 0.5, 0.75, 1.0), (0.1, 0.9), weights=((1.5, -0.5), (1.0,)))
    plan.save(path, about={"seed": 1, "note": "ü"})
    return path


def loads(path, data):
    path.write_bytes(data)
    message = refusal(ValueError, lambda: Plan.load(path))
    if message is not None:
        assert str(path) in message
        return
    plan = Plan.load(path)
    plan.save(path.with_name("again.json"))
    assert Plan.load(path.with_name("again.json")) == plan


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

    bytes_changed()
    entries_changed()


def test_plan_files(saved):
    run_files(saved, SHORT)


@pytest.mark.slow
def test_plan_files_at_length(saved):
    run_files(saved, LONG)


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b"", b"null", b"1" * 5000, b" " * 2**21],
    ids=["deep lists", "deep mappings", "UTF-16", "nothing", "null", "a long number", "too long"],
)
def test_files_that_are_no_plans(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with watched(), pytest.raises(ValueError, match=r"a\.json is no plan file"):
        Plan.load(tmp_path / "a.json")
