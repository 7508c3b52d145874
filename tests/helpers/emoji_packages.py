"""Small packages in the layout of the two with emoji pictures, and an npm that has only them."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowturbo.data import emoji as module
from flowturbo.data.emoji import Recipe
from flowturbo.data.emoji_classes import KINDS
from flowturbo.data.npm_packages import Package

SUBGROUPS = {
    **{"animal": "animal-mammal", "animal-face": "monkey-face", "bird": "animal-bird"},
    **{"bug": "animal-bug", "cat": "cat-face", "clock": "time", "clothing": "clothing"},
    **{"drink": "drink", "flower": "plant-flower", "food": "food-sweet", "fruit": "food-fruit"},
    **{"hand": "hands", "heart": "heart", "person": "person-role", "place": "place-building"},
    **{"plant": "plant-other", "sea": "animal-marine", "sky": "sky & weather"},
    **{"smiley": "face-smiling", "sport": "sport", "vehicle": "transport-ground"},
}
"""A subgroup of each kind."""

NOTO, FLUENT = "package/img/google/64/", "package/assets/"


def entry(name: str, subgroup: str, code: str, tones: tuple[str, ...] = ()) -> dict[str, Any]:
    """An emoji as the table of emoji-datasource has it."""

    def picture(code: str) -> dict[str, Any]:
        return {"unified": code, "image": f"{code.lower()}.png", "has_img_google": True}

    first, *rest = code.split("-")
    variations = {tone: picture("-".join([first, tone, *rest])) for tone in tones}
    more = {"skin_variations": variations} if tones else {}
    return {"short_name": name, "subcategory": subgroup, **picture(code), **more}


def small_table() -> list[dict[str, Any]]:
    """Five emoji of each kind; two sexes of one person and two tones of a hand; some of no kind."""
    table = [
        entry(
            f"{'clock' if kind == 'clock' else kind + '_'}{i}", group, f"{0x1F000 + 16 * k + i:X}"
        )
        for k, (kind, group) in enumerate(SUBGROUPS.items())
        for i in range(5)
    ]
    people = [
        entry(f"{sex}-cook", "person-role", f"{code}-200D-1F373", ("1F3FB", "1F3FF"))
        for sex, code in (("male", "1F468"), ("female", "1F469"))
    ]
    hands = [entry("wave", "hands", "1F44B", ("1F3FB", "1F3FF", "1F3FB-1F3FF"))]
    others = [entry("middle_finger", "hands", "1F595"), entry("watch", "time", "231A-FE0F")]
    return table + people + hands + others + [entry("soap", "household", "1F9FC")]


def picture(rng: np.random.Generator, side: int, kind: str) -> bytes:
    """Random colours, each of its own opacity. kind: of the file, "PNG" or "WEBP"."""
    pixels = rng.integers(0, 256, (side, side, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, format=kind, lossless=True, exact=True)
    return buffer.getvalue()


def package_files(seed: int = 0) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of the package of Noto's pictures and of that of Fluent's, by name."""
    rng, table = np.random.default_rng(seed), small_table()
    noto: dict[str, bytes] = {"package/emoji.json": json.dumps(table).encode()}
    fluent: dict[str, bytes] = {}
    for row in table:
        for one in (row, *row.get("skin_variations", {}).values()):
            noto[NOTO + one["image"]] = picture(rng, 8, "PNG")
            fluent[f"{FLUENT}{one['unified'].lower()}.webp"] = picture(rng, 16, "WEBP")
    for files, name, version in ((noto, "noto", "1.0.0"), (fluent, "@some/fluent", "2.0.0")):
        about = {"name": name, "version": version}
        files["package/package.json"] = json.dumps(about).encode()
    return noto, fluent


def write_package(path: Path, files: Mapping[str, bytes]) -> str:
    """Write a package as `npm pack` does -> the SHA-256 of its file."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def use_packages(
    patch: pytest.MonkeyPatch, folder: Path, noto: dict[str, bytes], fluent: dict[str, bytes]
) -> Recipe:
    """Write two packages, and make `flowturbo emoji` take them for those of its recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        Package("noto", "1.0.0", write_package(folder / "noto-1.0.0.tgz", noto)),
        Package("@some/fluent", "2.0.0", write_package(folder / "some-fluent-2.0.0.tgz", fluent)),
    )
    patch.setattr(module, "RECIPE", recipe)
    return recipe


def use_npm(patch: pytest.MonkeyPatch, folder: Path, script: str | None = None) -> None:
    """The only npm on the path copies packages from a folder, or runs another script."""
    copies = f"""cp '{folder}'/"$(echo "$2" | sed 's/^@//; s,/,-,; s/@/-/')".tgz ."""
    commands = folder / "bin"
    commands.mkdir(parents=True, exist_ok=True)
    npm = commands / "npm"
    npm.write_text(f"#!/bin/sh\n{script or copies}\n", encoding="utf-8")
    npm.chmod(0o755)
    patch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")


assert tuple(SUBGROUPS) == KINDS
