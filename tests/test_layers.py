"""The laws of the layout: imports point downwards only, and importing the package costs nothing
that is not needed.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PACKAGE, KERNELS = "flowturbo", "flowturbo_kernels"

# Folders of flowturbo from the bottom up: a module may import from its own folder and from those
# below it.
FOLDERS = (
    "runtime",
    "storage",
    "solver",
    "models",
    "sampling",
    "integrations",
    "data",
    "training",
    "evaluation",
    "tuning",
    "demo",
    "cli",
)
GROUND = {"checks", "version"}
"""The loose modules that everything may import."""
FACES = {PACKAGE, f"{PACKAGE}.__main__"}
"""What a user sees and runs: nothing in the package imports them."""
OUTSIDE = {
    "bench",
    "tests",
    *(path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")),
    "recipe",
    "calls",
}


def layer(module: str) -> int:
    """Of "flowturbo.models.sit" and the like; -1 for the kernels, 0 for the loose modules, the
    faces above all.
    """
    parts = module.split(".")
    if parts[0] == KERNELS:
        return -1
    if module in FACES:
        return len(FOLDERS) + 1
    return 0 if parts[1] in GROUND else FOLDERS.index(parts[1]) + 1


def modules(package: str, root: Path = ROOT) -> dict[str, Path]:
    paths = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Every module that this one imports, at the top or inside a function, with relative names
    resolved.
    """
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in known else source


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    known = modules(PACKAGE, root) | modules(KERNELS, root)
    return {name: set(imports(name, path, known)) for name, path in known.items()}


def reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for target in edges.get(todo.pop(), set()) - seen:
            seen.add(target)
            if target != PACKAGE:
                todo.append(target)
    return seen


def broken_laws(edges: dict[str, set[str]]) -> list[str]:
    """Every import that points upwards or outside, in words."""
    broken = []
    for module, targets in edges.items():
        for target in targets:
            top = target.split(".")[0]
            if top in OUTSIDE or (top in (PACKAGE, KERNELS) and layer(target) > layer(module)):
                broken.append(f"{module} imports {target}")
    broken += [
        f"{module} imports itself, through others"
        for module in edges
        if module in reachable(edges, module)
    ]
    return broken


def folder(module: str) -> str:
    return module.split(".")[1] if module.count(".") else module


def test_imports_point_downwards_only():
    edges = graph()
    assert {folder(module) for module in edges if module.startswith(f"{PACKAGE}.")} == {
        *FOLDERS,
        *GROUND,
        "__main__",
    }
    assert broken_laws(edges) == []


def test_folders_have_no_cycle():
    """It follows from the order; asked of the folders themselves, so that an order with equals
    would still be held to it.
    """
    between: dict[str, set[str]] = {}
    for module, targets in graph().items():
        if module not in FACES:
            between.setdefault(folder(module), set()).update(
                folder(t)
                for t in targets
                if t.startswith(f"{PACKAGE}.") and folder(t) != folder(module)
            )
    assert not [name for name in between if name in reachable(between, name)]


def test_training_does_not_know_the_sampler():
    """Only how a plan calls a model, for refiners that are trained at the calls of plans."""
    modules = reachable(graph(), "flowturbo.training.train")
    assert "models" in map(folder, modules)
    sampling = {module for module in modules if folder(module) == "sampling"}
    assert sampling <= {"flowturbo.sampling", "flowturbo.sampling.velocity_field"}


def test_steps_and_plans_know_no_model():
    edges = graph()
    for module in edges:
        if folder(module) in ("solver", "runtime"):
            assert not [t for t in reachable(edges, module) if t.startswith("flowturbo.models")], (
                module
            )


@pytest.fixture(scope="module")
def sources() -> dict[Path, str]:
    return {
        path.relative_to(ROOT): path.read_text()
        for path in (modules(PACKAGE) | modules(KERNELS)).values()
    }


@pytest.mark.parametrize(
    "file, line, breaks",
    [
        ("flowturbo/runtime/rng.py", "from ..sampling.sampler import sample", True),
        (
            "flowturbo/models/sit.py",
            "def f():\n    from ..sampling.velocity_field import GuidedField",
            True,
        ),
        ("flowturbo/solver/steps.py", "import flowturbo", True),
        ("flowturbo/solver/steps.py", "from .. import sample", True),
        ("flowturbo/training/train.py", "from ..cli import main", True),
        ("flowturbo/storage/files.py", "from tests import tiny", True),
        ("flowturbo/storage/files.py", "import bench.harness", True),
        ("flowturbo/solver/path.py", "from . import steps\nfrom .steps import State", False),
        ("flowturbo/solver/path.py", "from ..models.sit import SiT", True),
        ("flowturbo/solver/plan.py", "from ..runtime.rng import noise", False),
        ("flowturbo/storage/files.py", "from ..runtime.rng import noise", False),
        ("flowturbo/runtime/rng.py", "from ..storage import files", True),
        ("flowturbo/checks.py", "from .runtime.rng import noise", True),
        ("flowturbo_kernels/adaln.py", "from flowturbo.solver.path import on_path", True),
        ("flowturbo_kernels/_op.py", "from .adaln import EPS", True),
    ],
)
def test_these_laws_can_be_broken(tmp_path, sources, file, line, breaks):
    for path, text in sources.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + (f"\n{line}\n" if str(path) == file else ""))
    assert (set(broken_laws(graph(tmp_path))) > set(broken_laws(graph()))) == breaks


HEAVY = [
    "triton",
    "cupy",
    "sklearn",
    "scipy",
    "matplotlib",
    "diffusers",
    "transformers",
    "tensorboard",
    "tyro",
    "gradio",
    "torch._dynamo",
]


@pytest.mark.parametrize("package", [PACKAGE, KERNELS])
def test_import_is_light(package):
    """Measured against what torch and the other requirements import by themselves."""
    code = f"""
import sys, numpy, safetensors.torch, torch, torch.nn, tqdm.auto
before = set(sys.modules)
import {package}
new = set(sys.modules) - before
heavy = [m for m in {HEAVY!r} if any(n == m or n.startswith(m + ".") for n in new)]
assert not heavy, heavy
assert not torch.cuda.is_initialized()
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
if {package!r} == {KERNELS!r}:
    assert not any(n.split(".")[0] == {PACKAGE!r} for n in new)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr


def test_public_names():
    import flowturbo
    import flowturbo_kernels

    for package in (flowturbo, flowturbo_kernels):
        assert sorted(package.__all__) == sorted(set(package.__all__))
        assert all(hasattr(package, name) for name in package.__all__)
    assert {"load", "sample", "Plan", "FlowModel", "CheckpointError"} <= set(flowturbo.__all__)
    assert set(flowturbo_kernels.OPS) <= set(flowturbo_kernels.__all__)
    for package in (flowturbo, flowturbo_kernels):
        assert (Path(package.__file__).parent / "py.typed").is_file()
