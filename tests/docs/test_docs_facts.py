"""The documents' signatures, messages, figures and links agree with the library."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator

import pytest
from documents import ROOT, blocks

import flowturbo as ft
import flowturbo_kernels
from flowturbo.cli.main import COMMANDS

DOCS = ROOT / "docs"
API = (DOCS / "api.md").read_text()


def untyped(name: str, function: object) -> str:
    """The signature without types, as in the API page."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return f"{name}{signature.replace(parameters=plain, return_annotation=inspect.Signature.empty)}"


def stated() -> list[str]:
    """The signatures in the API page; an indented line continues the line above."""
    texts = [block.text.replace("\n    ", " ") for block in blocks(API) if block.language == "text"]
    return [line for text in texts for line in text.splitlines()]


def test_the_reference_has_the_signatures_of_the_library():
    places = {name: getattr(ft, name) for name in ("FlowModel", "Plan", "StagedPlan")}
    places["ft"] = ft
    for line in stated():
        *path, name = line.split("(")[0].split(".")
        holder = places[path[-1]] if path else flowturbo_kernels
        assert line == untyped(".".join([*path, name]), getattr(holder, name))


def test_the_reference_names_everything():
    # All public names of flowturbo, and the kernels' operations.
    for name in ft.__all__:
        assert f"ft.{name}" in API, name
    lines = stated()
    for name in [*flowturbo_kernels.OPS, "use_backend", "unavailable"]:
        assert any(line.startswith(f"{name}(") for line in lines), name
    for command in COMMANDS:
        assert f"`flowturbo {command}`" in API, command


def strings(tree: ast.AST) -> Iterator[str]:
    """Every string in a module, with … for the values of an f-string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_in_troubleshooting_are_those_of_the_library():
    sources = [
        *(ROOT / "flowturbo").rglob("*.py"),
        *(ROOT / "flowturbo_kernels").glob("*.py"),
        ROOT / "setup.py",
    ]
    texts = {text for path in sources for text in strings(ast.parse(path.read_text()))}
    messages = [
        line.strip()
        for b in blocks((DOCS / "troubleshooting.md").read_text())
        if b.language == "text"
        for line in b.text.splitlines()
    ]
    assert len(messages) > 40
    unknown = [message for message in messages if not any(message in text for text in texts)]
    assert not unknown


@pytest.mark.parametrize(
    "document",
    [ROOT / "README.md", DOCS / "evaluation.md", DOCS / "plans.md"],
    ids=lambda path: path.name,
)
def test_figures_of_the_bundled_model_are_those_that_were_measured(document):
    """Rows such as | `H1P5R3` | 7 + 6 | 7.52 | 8.1 | 5.00 | 0.094 |, and a plan followed by a
    distance, such as `H6` (4.85).
    """
    measured = {row["plan"]: row for row in json.loads((DOCS / "quality.json").read_text())["rows"]}
    text = document.read_text()
    rows = re.findall(
        r"^\| `([A-Z0-9]+)` \| (\d+) \+ (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        text,
        re.MULTILINE,
    )
    for plan, *figures in rows:
        row = measured[plan]
        expected = [
            row["predictor_calls"],
            row["refiner_calls"],
            f"{row['cost']:.2f}",
            f"{row['ms_per_image']:.1f}",
        ]
        assert figures == [*map(str, expected), f"{row['frechet']:.2f}", f"{row['rms']:.3f}"], plan
    named = re.findall(r"`([A-Z][A-Z0-9]+)` \(?(\d+\.\d+)\)?", text)
    for plan, distance in named:
        found = measured[plan]
        assert distance in (f"{found['frechet']:.2f}", f"{found['rms']:.3f}"), (plan, distance)
    assert rows or named


def test_figures_of_the_search_are_those_that_were_measured():
    """The best plan of each scheme for a number of predictor calls."""
    rows = json.loads((DOCS / "tuning.json").read_text())["rows"]
    page = (DOCS / "search.md").read_text()
    columns = [
        lambda row: row["how"] == "fitted" and row["refiner_calls"] == 1,
        lambda row: row["how"] == "fitted" and row["refiner_calls"] == 0,
        *(
            lambda row, scheme=scheme: row["group"].startswith(scheme)
            for scheme in ("Adams-Bashforth", "UniPC", "DPM++2M", "Heun", "FlowTurbo")
        ),
    ]
    found = re.findall(r"^\| (\d) \| (\*\*0\..*) \|$", page, re.MULTILINE)
    assert [calls for calls, _ in found] == list("2345")
    for calls, cells in found:
        for cell, of in zip(cells.split("|"), columns, strict=True):
            distances = [
                row["rms"] for row in rows if row["predictor_calls"] == int(calls) and of(row)
            ]
            assert cell.strip(" *") == (f"{min(distances):.3f}" if distances else ""), (calls, cell)
    best = next(row for row in rows if row["plan"] == "L2M1")
    assert f"`L2M1` at {best['price']:.2f} calls has {best['frechet']:.2f}" in page
    assert f"All {len(rows)} plans" in page

    by_name = {row["plan"]: row for row in rows}
    for name in ("L3M1", "A4", "H1P2R1"):
        assert re.search(rf"`{name}`[^`]*{by_name[name]['ms_per_image']:.1f}", page), name
    for row in rows:
        if row["how"] == "fitted":
            as_fast = [
                r
                for r in rows
                if r["how"] not in ("fitted", "searched")
                and r["ms_per_image"] <= 1.03 * row["ms_per_image"]
            ]
            assert as_fast
            assert all(row["rms"] < rival["rms"] for rival in as_fast), row["plan"]
    times: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        times.setdefault((row["predictor_calls"], row["refiner_calls"]), []).append(
            row["ms_per_image"]
        )
    assert (
        f"by up to {100 * max(max(found) / min(found) - 1 for found in times.values()):.0f} %"
        in page
    )


def test_links_from_outside_the_site_lead_somewhere():
    """mkdocs checks the links within the site when CI builds it."""
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", document.read_text()):
            assert not target or (document.parent / target).exists(), f"{document.name}: {target}"


def test_pages_are_in_the_sites_navigation():
    listed = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {path.name for path in DOCS.glob("*.md")}


def test_the_paper_is_reproduced_by_commands_that_are_there():
    """Every plan in its tables occurs in a command."""
    page = (DOCS / "reproduce.md").read_text()
    tabled = set(re.findall(r"\| `([A-Z0-9]+)` \| \d", page))
    run = {
        word
        for b in blocks(page)
        if b.language in ("bash", "python")
        for word in re.findall(r"\b[A-Z][A-Z0-9]*\d\b", b.text)
    }
    assert (
        len(tabled) == 9 + 5 + 7
    )  # of ImageNet; of the order, without H5P7R3 again; of COCO, without H8 again
    assert tabled <= run
    for needed in (
        "VIRTUAL_imagenet256_labeled.npz",
        "3.93",
        "2.12",
        "2.27 to 2.33",
        "stabilityai/sd-vae-ft-ema",
    ):
        assert needed in page
