"""The modules of bench/ import downwards: none imports itself through others."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from paths import ROOT

FILES = {path.stem: path for path in (ROOT / "bench").glob("*.py")}


def imported(path: Path) -> set[str]:
    """Modules of bench/ that a file names, those for type checkers alone as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module)
    return found & set(FILES)


def test_no_module_imports_itself_through_others():
    order = TopologicalSorter({name: imported(path) for name, path in FILES.items()})
    names = list(order.static_order())  # CycleError names those of a cycle
    assert names.index("subjects") < names.index("sampling") < names.index("rivals")
