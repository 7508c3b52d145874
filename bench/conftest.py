"""What to time: options of `pytest bench`."""

from __future__ import annotations

import lines
import pytest
import torch

ON_CUDA = torch.cuda.is_available()
OPTIONS = {
    # name: (on a GPU, elsewhere, what)
    "batches": ("1 8 32", "1", "batch sizes"),
    "plans": ("H1P5R3 H2P4R2 H5P7R3 H8P9R5 H8 H15 H24", "H1P1R1 H2", "plans"),
    "sizes": ("256 512", "64", "heights and widths of images"),
    "decode": ("yes no", "yes no", "with the VAE, without it, or both"),
    "rivals": (
        "ours ours-fp8 ours-eager autocast eager compile max-autotune plan-graph "
        "plan-graph-hoisted "
        "max-autotune-fp8 plan-graph-fp8 diffusers",
        "ours eager",
        "ours and rivals",
    ),
    "providers": ("eager compiled triton cuda auto",) * 2 + ("who runs an operation",),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, (cuda, cpu, what) in OPTIONS.items():
        parser.addoption(
            f"--{name}", default=cuda if ON_CUDA else cpu, help=f"{what}, separated by spaces"
        )
    parser.addoption(
        "--rounds", type=int, default=None, help="timed rounds of each; their median counts"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("lines"):
        config.pluginmanager.register(lines, "lines")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    """Of a benchmark: --rounds, or what its module says."""
    return request.config.getoption("rounds") or request.module.ROUNDS


ORDER = {
    # argument: option, the first varies slowest: what is compiled for a rival serves all plans, and
    # a run that is cut short has measured everyone at some sizes rather than someone at all.
    "rival": "rivals",
    "size": "sizes",
    "batch": "batches",
    "decode": "decode",
    "plan": "plans",
    "index": None,
    "who": "providers",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, option in ORDER.items():
        if argument not in metafunc.fixturenames:
            continue
        if option is None:
            metafunc.parametrize(
                argument, range(len(metafunc.module.CASES)), ids=metafunc.module.CASES
            )
            continue
        values = metafunc.config.getoption(option).split()
        _check(metafunc, argument, option, values)
        metafunc.parametrize(argument, [int(v) if v.isdigit() else v for v in values])


def _check(metafunc: pytest.Metafunc, argument: str, option: str, values: list[str]) -> None:
    known = {
        "rival": getattr(metafunc.module, "RIVALS", None),
        "who": getattr(metafunc.module, "PROVIDERS", None),
    }.get(argument)
    if known is not None and (wrong := [v for v in values if v not in known]):
        raise pytest.UsageError(
            f"--{option} must be some of {', '.join(known)}, got {', '.join(wrong)}"
        )
