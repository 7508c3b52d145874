"""The rules of the emoji data: which emoji is of which class, and which are held out."""

import random

import pytest
from emoji_packages import FLUENT, NOTO, entry, package_files, small_table

from flowturbo.data.emoji_classes import (
    CLASS_NAMES,
    KINDS,
    Picture,
    family_of,
    held_out,
    kind_of,
    pictures,
)


@pytest.mark.parametrize(
    "name, subgroup, kind",
    [
        ("cat", "animal-mammal", "cat"),
        ("joy_cat", "cat-face", "cat"),
        ("cat2", "animal-mammal", "animal"),
        ("dog", "animal-mammal", "animal-face"),
        ("see_no_evil", "monkey-face", "animal-face"),
        ("frog", "animal-amphibian", "animal-face"),
        ("dango", "food-asian", "food"),
        ("cake", "food-sweet", "food"),
        ("carrot", "food-vegetable", "food"),
        ("avocado", "food-vegetable", "fruit"),
        ("tennis", "sport", "sport"),
        ("skateboard", "transport-ground", "sport"),
        ("clock130", "time", "clock"),
        ("alarm_clock", "time", None),
        ("rainbow", "sky & weather", "sky"),
        ("umbrella", "sky & weather", None),
        ("technologist", "person-role", None),
        ("middle_finger", "hand-single-finger", None),
        ("soap", "household", None),
    ],
)
def test_emoji_are_of_the_kinds_that_they_show(name: str, subgroup: str, kind: str | None) -> None:
    assert kind_of(name, subgroup) == kind


def test_classes_are_numbered_in_order():
    assert list(KINDS) == sorted(KINDS)
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 42
    for k, kind in enumerate(KINDS):
        for style, name in enumerate((kind, f"{kind}-3d")):
            label = Picture("x", kind, style, "1F600", "x.png").label
            assert (label, CLASS_NAMES[label]) == (2 * k + style, name)


def test_packages_name_one_emoji_in_two_ways():
    """Fluent's files may lack the variation selector of the table, and have it where it has not."""
    table = [entry("heart", "heart", "2764-FE0F"), entry("blue_heart", "heart", "1F499")]
    noto = {f"{NOTO}2764-fe0f.png", f"{NOTO}1f499.png"}
    fluent = {f"{FLUENT}2764.webp", f"{FLUENT}1f499-fe0f.webp", f"{FLUENT}1f49a.webp", "README.md"}
    found = [(p.name, p.style, p.member) for p in pictures(table, noto, fluent)]
    assert found == [
        ("heart", 0, f"{NOTO}2764-fe0f.png"),
        ("heart", 1, f"{FLUENT}2764.webp"),
        ("blue_heart", 0, f"{NOTO}1f499.png"),
        ("blue_heart", 1, f"{FLUENT}1f499-fe0f.webp"),
    ]
    table[0]["has_img_google"] = False  # what is there instead is another font's
    assert [p.style for p in pictures(table, noto, fluent)] == [1, 0, 1]


def test_people_and_hands_have_tones_and_two_people_have_not():
    tones = ("1F3FB", "1F3FF", "1F3FB-1F3FF")
    table = [
        entry("wave", "hands", "1F44B", tones),
        entry("man", "person", "1F468", tones),
        entry("santa", "heart", "1F385", tones),  # of another kind
    ]
    images = [NOTO + v["image"] for e in table for v in (e, *e["skin_variations"].values())]
    assert [p.member.removeprefix(NOTO) for p in pictures(table, images, [])] == [
        *("1f44b.png", "1f44b-1f3fb.png", "1f44b-1f3ff.png"),
        *("1f468.png", "1f468-1f3fb.png", "1f468-1f3ff.png"),
        "1f385.png",
    ]


@pytest.mark.parametrize(
    "codes",
    [
        ("1F9D1-200D-1F373", "1F468-200D-1F373", "1F469-200D-1F373"),  # cooks
        ("1F646", "1F646-200D-2640-FE0F", "1F646-200D-2642-FE0F"),  # gesturing OK
        ("1F9D1-200D-2695-FE0F", "1F468-200D-2695-FE0F", "1F469-200D-2695"),  # health workers
        ("1F9D2", "1F466", "1F467"),  # children
    ],
)
def test_sexes_of_one_person_are_one_family(codes: tuple[str, ...]) -> None:
    assert {family_of(code) for code in codes} == {family_of(codes[0])}
    assert family_of(codes[0]) != family_of("1F9D1-200D-1F33E")


def test_whole_families_are_held_out_of_every_kind():
    """In both styles and all tones, whatever the order of the table."""
    noto, fluent = package_files()
    table = small_table()
    found = pictures(table, noto.keys(), fluent.keys())
    chosen = held_out(found)
    out = [p for p in found if p.family in chosen]
    assert {p.label for p in out} == set(range(42))
    for name in {p.name for p in out}:
        assert len({p.member for p in found if p.name == name}) == sum(p.name == name for p in out)
    random.Random(3).shuffle(table)
    assert held_out(pictures(table, noto.keys(), fluent.keys())) == chosen


def test_a_twentieth_is_held_out():
    found = [
        Picture(f"x{i}", "heart", style, f"{i:X}", f"{i}.{style}")
        for i in range(200)
        for style in (0, 1)
    ]
    assert len(held_out(found)) == 10
    lacking = [p for p in found if p.style == 0 or p.family not in held_out(found)]
    assert not held_out(found) & held_out(lacking)  # these are of one style only
