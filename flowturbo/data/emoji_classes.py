"""Which emoji are of which class, and which are held out: the rules of the emoji data set.

A class is a kind of thing in one of two styles, "cat" of Noto and "cat-3d" of Fluent 3D. The kinds
follow the subgroups of Unicode; what does not look like its subgroup is moved or left out.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..storage.files import CheckpointError

STYLES = ("", "-3d")
"""Ends of the classes' names: of Noto Emoji and of Fluent Emoji 3D."""

_SUBGROUPS = {
    "animal": "animal-mammal animal-reptile animal-amphibian",
    "animal-face": "monkey-face",
    "bird": "animal-bird",
    "bug": "animal-bug",
    "cat": "cat-face",
    "clock": "time",
    "clothing": "clothing",
    "drink": "drink dishware",
    "flower": "plant-flower",
    "food": "food-prepared food-asian food-sweet",
    "fruit": "food-fruit food-vegetable",
    "hand": "hand-fingers-open hand-fingers-closed hand-fingers-partial hand-single-finger hands"
    " hand-prop",
    "heart": "heart",
    "person": "person person-role person-gesture",
    "place": "place-building place-religious place-geographic place-other",
    "plant": "plant-other",
    "sea": "animal-marine",
    "sky": "sky&weather",
    "smiley": "face-smiling face-affection face-tongue face-hand face-neutral-skeptical"
    " face-sleepy face-unwell face-hat face-glasses face-concerned",
    "sport": "sport",
    "vehicle": "transport-ground transport-air transport-water",
}
KINDS = tuple(_SUBGROUPS)
"""In alphabetical order."""
CLASS_NAMES = tuple(kind + style for kind in KINDS for style in STYLES)
"""The name of each label: the label of kind k in style s is 2 k + s."""

_KIND_OF_SUBGROUP = {s: kind for kind, names in _SUBGROUPS.items() for s in names.split()}

# Short names of emoji that show something else than their subgroup.
_MOVED = {
    "animal-face": "bear boar cow dog dragon_face fox_face frog hamster horse koala lion_face"
    " monkey_face moose mouse panda_face pig polar_bear rabbit raccoon tiger unicorn_face wolf",
    "cat": "cat",
    "clothing": "martial_arts_uniform running_shirt_with_sash",
    # Vegetables that nobody calls a fruit.
    "food": "beans broccoli carrot corn garlic ginger_root leafy_green onion pea_pod peanuts potato"
    " root_vegetable",
    "sport": "roller_skate skateboard",
}
_KIND_OF_NAME = {name: kind for kind, names in _MOVED.items() for name in names.split()}

# Short names of emoji that are of no kind, by the reason.
_LEFT_OUT = {
    "a part, a nest, a fungus or a stamp": "brown_mushroom empty_nest feather feet microbe mushroom"
    " nest_with_eggs pig_nose spider_web white_flower wing",
    "hardly a hand, a rude one, or a person lying down": "bow man-bowing middle_finger nail_care"
    " selfie woman-bowing writing_hand",
    # By the notice in the repository of Microsoft's pictures.
    "not under the licence of the others": "female-technologist male-technologist technologist",
    "an outline, a cloud or a sign": "dotted_line_face face_in_clouds heart_decoration"
    " heavy_heart_exclamation_mark_ornament love_letter",
    "a vessel, a wrapping or cutlery": "amphora bowl_with_spoon canned_food chopsticks"
    " fork_and_knife hocho ice_cube jar knife_fork_plate salt spoon takeout_box",
    "carried, not worn": "folding_hand_fan gem hair_pick handbag lipstick pouch prayer_beads purse"
    " ring school_satchel shopping_bags",
    "not in the sky": "closed_umbrella cyclone droplet fire ocean snowman snowman_without_snow"
    " thermometer umbrella umbrella_on_ground umbrella_with_rain_drops wind_blowing_face",
    "a sign, a part or a material": "anchor barber bricks busstop carousel_horse construction"
    " fuelpump hotsprings motorway octagonal_sign oil_drum parachute railway_track ring_buoy rock"
    " rotating_light satellite seat traffic_light vertical_traffic_light wheel wood",
}
_NO_KIND = frozenset(name for names in _LEFT_OUT.values() for name in names.split())


def kind_of(name: str, subgroup: str) -> str | None:
    """The kind of an emoji by its short name and subgroup; None if it is of none."""
    kind = _KIND_OF_NAME.get(name) or _KIND_OF_SUBGROUP.get(subgroup.replace(" ", ""))
    # Of the subgroup of time only clock faces look alike.
    if name in _NO_KIND or (kind == "clock" and not name.startswith("clock")):
        return None
    return kind


@dataclass(frozen=True)
class Picture:
    """A picture of the data set: of an emoji, in one style and one skin tone.

    member: the name of its file in the package of its style.
    """

    name: str
    kind: str
    style: int
    family: str
    member: str

    @property
    def label(self) -> int:
        return len(STYLES) * KINDS.index(self.kind) + self.style


def pictures(
    table: Sequence[Mapping[str, Any]], noto: Collection[str], fluent: Collection[str]
) -> list[Picture]:
    """The pictures of the data set, in the order of the table.

    table: emoji.json of emoji-datasource. noto, fluent: the names of the packages' files.
    Each emoji is there in both styles if both have it; people and hands also in five skin tones.
    Raises CheckpointError for a picture of Noto that the table promises and the package lacks.
    """
    by_code = {_plain(_stem(member)): member for member in fluent if member.endswith(".webp")}
    found = []
    for entry in table:
        name = entry["short_name"]
        kind = kind_of(name, entry["subcategory"])
        if kind is None:
            continue
        family = family_of(entry["unified"])
        for variant in _variants(entry, kind):
            if variant["has_img_google"]:
                member = NOTO_FOLDER + variant["image"]
                if member not in noto:
                    raise CheckpointError(f"the package of Noto's pictures lacks {member}")
                found.append(Picture(name, kind, 0, family, member))
            if (code := _plain(variant["unified"])) in by_code:
                found.append(Picture(name, kind, 1, family, by_code[code]))
    return found


NOTO_FOLDER, FLUENT_FOLDER = "package/img/google/64/", "package/assets/"


def _stem(member: str) -> str:
    return member.rpartition("/")[2].rpartition(".")[0]


def _plain(code: str) -> str:
    """Code points without the variation selector, which the packages do not set alike."""
    return code.upper().replace("-FE0F", "")


def _variants(entry: Mapping[str, Any], kind: str) -> Iterator[Mapping[str, Any]]:
    """The emoji, then its skin tones. Two people of different tones are left out."""
    yield entry
    if kind in ("person", "hand"):
        for tone, variant in entry.get("skin_variations", {}).items():
            if "-" not in tone:
                yield variant


# Man, woman; boy, girl; the same, old; prince, princess; pregnant: to the one without a sex.
_WITHOUT_SEX = {
    **dict.fromkeys(("1F468", "1F469"), "1F9D1"),
    **dict.fromkeys(("1F466", "1F467"), "1F9D2"),
    **dict.fromkeys(("1F474", "1F475"), "1F9D3"),
    **dict.fromkeys(("1F934", "1F478"), "1FAC5"),
    **dict.fromkeys(("1F930", "1FAC3"), "1FAC4"),
}


def family_of(code: str) -> str:
    """The code points of an emoji without those of sex.

    A woman, a man and a person of one profession differ in little more than their hair, so they are
    held out together or not at all.
    """
    plain = _plain(code).replace("-200D-2640", "").replace("-200D-2642", "")
    return "-".join(_WITHOUT_SEX.get(point, point) for point in plain.split("-"))


_EVERY, _FIRST = 20, 3
"""Of each kind every twentieth family is held out, from the fourth on.

The fourth, so that every kind has one, in both styles, and that no picture held out has a twin
among the others.
"""


def held_out(found: Sequence[Picture]) -> set[str]:
    """The families that are held out: a twentieth of each kind, with all their styles and tones.

    They are in the order of a checksum of their code points, so that the choice is of no pattern.
    Families that one style lacks stay in the training set.
    """
    styles: dict[tuple[str, str], set[int]] = {}
    for picture in found:
        styles.setdefault((picture.kind, picture.family), set()).add(picture.style)
    chosen: set[str] = set()
    for kind in KINDS:
        families = [f for (k, f), have in styles.items() if k == kind and len(have) == len(STYLES)]
        families.sort(key=lambda family: (zlib.crc32(family.encode()), family))
        chosen.update(families[_FIRST::_EVERY])
    return chosen
