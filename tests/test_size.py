"""The laws of size: a reader takes in a file or a function at once, and each idea stands once."""

import ast
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from paths import ROOT

FOLDERS = ("flowturbo", "flowturbo_kernels", "integrations", "bench", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FILE, FUNCTION, REPEATED = 400, 60, 10
"""Most lines of a file, of a function below its arguments and docstring, and of a repeated run."""
PAGES = {"page"}
"""Functions that lay out a page, from top to bottom."""


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, lines of its body) of each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                yield node.name, (node.end_lineno or 0) - body[0].lineno + 1


def too_large(path: Path) -> list[str]:
    text = path.read_text()
    what = [f"{len(text.splitlines())} lines"] if len(text.splitlines()) > FILE else []
    return what + [
        f"{name}: {lines} lines"
        for name, lines in functions(ast.parse(text))
        if lines > FUNCTION and name not in PAGES
    ]


def repeated(files: dict[str, str], most: int = REPEATED) -> list[str]:
    """Runs of more than `most` equal lines, blank ones and imports aside, by where they begin."""
    seen: dict[tuple[str, ...], str] = {}
    runs = []
    for name, text in files.items():
        lines = [
            (number, line.strip())
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip() and not line.strip().startswith(("import ", "from "))
        ]
        for start in range(len(lines) - most):
            window = tuple(line for _, line in lines[start : start + most + 1])
            place = f"{name}:{lines[start][0]}"
            if seen.setdefault(window, place) != place:
                runs.append(f"{place} as {seen[window]}")
    return runs


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_functions_are_small(folder):
    wrong = {
        str(path.relative_to(ROOT)): what
        for path in FILES
        if path.is_relative_to(ROOT / folder) and (what := too_large(path))
    }
    assert not wrong


def test_the_package_repeats_nothing():
    package = [path for path in FILES if path.relative_to(ROOT).parts[0].startswith("flowturbo")]
    assert repeated({str(path.relative_to(ROOT)): path.read_text() for path in package}) == []


def test_these_laws_can_be_broken(tmp_path):
    lines = [f"x{i} = {i}" for i in range(REPEATED + 1)]
    text, other = "\n".join(lines), "\n\n".join(lines)
    assert repeated({"a": text, "b": other}) == ["b:1 as a:1"]
    assert not repeated({"a": text, "b": "\n".join(lines[:-1])})
    assert not repeated({"a": text, "b": other.replace("x5", "y5")})
    for count, wrong in pairwise([FUNCTION, FUNCTION + 1, FILE]):
        path = tmp_path / f"{count}.py"
        path.write_text("def f():\n    '''Text.'''\n" + "    x = 1\n" * wrong)
        assert too_large(path)
        path.write_text("def f():\n    '''Text.'''\n" + "    x = 1\n" * min(count, FUNCTION))
        assert not too_large(path)
    path.write_text("x = 1\n" * (FILE + 1))
    assert too_large(path) == [f"{FILE + 1} lines"]


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by name, and leaves out, with an error, the second of two."""
    names = Counter(path.name for path in FILES if path.is_relative_to(ROOT / "tests"))
    unique = {"__init__.py", "conftest.py"}
    assert [name for name, count in names.items() if count > 1 and name not in unique] == []
