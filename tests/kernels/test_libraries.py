"""Kernels of other packages as candidates: when they are offered, what they are given, and that
nothing they do wrong is felt. The packages are stand-ins that compute with torch on the CPU.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from close import assert_close
from fake_libraries import Fakes
from fake_machine import GPU, another_process

from flowturbo_kernels import _choices, _flash_attention, _quack, _tune, linear
from flowturbo_kernels._library import Library, LibraryError, LibraryKernel, _ordered
from flowturbo_kernels._measure import Timing
from flowturbo_kernels.linear import _candidates

M, K, N = 40, 1024, 288


@pytest.fixture
def fakes(machine, monkeypatch):
    """Both packages, on a machine where each candidate takes a second and a library's less, the
    later in the list the less.
    """
    fakes = Fakes(monkeypatch)
    order: list[object] = []

    def timing(run, sets, device):
        run(*sets[0])
        order.append(run)
        return Timing(1 / (1 + len(order)) if isinstance(run, LibraryKernel) else 1.0, True)

    monkeypatch.setattr(_tune, "timing", timing)
    yield fakes
    fakes.forget()


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def product() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    return numbers(M, K), numbers(N, K) / 32, numbers(N), None


def chosen_among(args=None) -> _tune.Candidates:
    """Torch's product and quack's, as on a GPU: without Triton's tiles, which need one."""
    candidates = _candidates(*(args or product()))
    functions = {n: f for n, f in candidates.functions.items() if not n.startswith("triton")}
    return candidates._replace(functions=functions, device=GPU)


def test_importing_the_kernels_imports_no_library():
    code = "import sys, flowturbo_kernels; print([n for n in sys.modules if n[:5] in {!r}])"
    names = ["quack", "flash", "cutla"]
    out = subprocess.run(
        [sys.executable, "-c", code.format(names)], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_a_product_of_quack_is_taken_where_it_is_the_fastest(fakes):
    candidates = chosen_among()
    assert next(iter(candidates.functions)) == "torch"
    names = ["quack 128x144", "quack 64x144"]
    assert [n for n in candidates.functions if "split" not in n] == ["torch", *names]
    y = candidates.run()
    x, weight, bias, _ = product()
    assert_close(y, linear.reference(x.double(), weight.double(), bias.double()), 0.004)
    assert candidates.known_fastest() == "quack 64x144 split 4"
    assert fakes.log[-1][-1]["split_k"] == 4


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda f: f.versions.pop("quack-kernels"), "it is not installed (extra: hopper)"),
        (
            lambda f: f.versions.update({"quack-kernels": "0.5.3"}),
            "quack-kernels 0.5.3 is too old: 0.6.5 or later is needed",
        ),
        (lambda f: setattr(f, "capability", (8, 9)), "the GPU is older than sm_90"),
        (lambda f: setattr(f, "capability", (12, 0)), "it has no such kernels for sm_120"),
        (lambda f: setattr(f, "capturing", True), "it was not tried before this CUDA graph's capt"),
        (lambda f: f.broken_import("quack.activation"), "it can't be imported (ModuleNotFound"),
    ],
)
def test_where_quack_can_not_run_it_is_not_offered_and_says_why(fakes, change, reason):
    change(fakes)
    candidates = chosen_among()
    assert list(candidates.functions) == ["torch"]
    assert candidates.run().shape == (M, N)
    assert _quack.unavailable(GPU).startswith(reason)
    version = fakes.versions.get("quack-kernels")
    described = f"{version}, not used: {reason}" if version else f"not used: {reason}"
    assert _quack.LIBRARY.describe(GPU).startswith(described)


def test_what_is_on_the_cpu_is_not_offered_to_it(fakes):
    assert _quack.LIBRARY.unavailable(torch.device("cpu")) == "tensors are on the cpu"
    assert _quack.LIBRARY.loaded is None


def test_versions_compare_as_numbers():
    versions = ["0.6.5", "0.6.10", "0.10.0", "4.0.0b9", "4.0.0b36", "4.0.0rc1", "4.0.0", "4.1"]
    assert sorted(versions, key=_ordered) == versions
    assert _ordered("0.6.5+cu13") == _ordered("0.6.5")
    assert _ordered("unknown") < _ordered("0.1")


def refusing(tile_rows: int, error: Exception):
    def fails(options) -> None:
        if options["tile_M"] == tile_rows:
            raise error

    return fails


def test_a_kernel_that_does_not_compile_is_left_out_for_good(fakes):
    candidates = chosen_among()
    fakes.epilogue("with_bias").fails = refusing(64, ValueError("no such tile\nat all"))
    candidates.run()
    assert candidates.known_fastest() == "quack 128x144 split 4"
    describes = _quack.LIBRARY.describe(GPU)
    assert describes.startswith("0.6.5 (failed: quack 64x144: ValueError: no such tile; ")
    [entry] = _choices.read(_choices.facts(GPU)).values()
    told = "CompilationError: quack-kernels: ValueError: no such tile"
    assert entry["cannot"]["quack 64x144"] == told
    calls = len(fakes.log)
    candidates.run()
    assert len(fakes.log) == calls + 1


def test_a_compiler_that_compiles_nothing_is_not_asked_again(fakes):
    candidates = chosen_among()
    fakes.epilogue("with_bias").fails = lambda options: 1 / 0
    candidates.run()
    assert candidates.known_fastest() == "torch"
    assert _quack.unavailable(GPU).startswith("its first ")
    assert "ZeroDivisionError: division by zero" in _quack.LIBRARY.describe(GPU)
    assert list(chosen_among().functions) == ["torch"]


@pytest.mark.parametrize(
    "error, remembered",
    [
        (RuntimeError("CUDA error: an illegal memory access"), False),
        (OSError("no space left"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (TypeError("argument 3"), True),
    ],
)
def test_only_what_will_fail_again_is_kept_on_disk(fakes, error, remembered):
    candidates = chosen_among()
    fakes.epilogue("with_bias").fails = refusing(64, error)
    candidates.run()
    assert bool(_choices.read(_choices.facts(GPU))) == remembered
    lacks_memory = isinstance(error, torch.OutOfMemoryError)
    assert bool(_quack.LIBRARY.failures) != lacks_memory


@pytest.mark.parametrize(
    "spoils",
    [lambda y: y + 0.1, lambda y: None, lambda y: y * float("nan"), lambda y: y.roll(1, 0)],
    ids=["inexact", "not written", "not finite", "other rows"],
)
def test_a_wrong_result_is_never_taken(fakes, spoils):
    candidates = chosen_among()
    for memory in (None, linear.reference(*product())):  # or what was there before
        fakes.epilogue("with_bias").spoils = spoils
        y = candidates.run()
        assert_close(y, linear.reference(*(t.double() for t in product()[:3])), 0.004)
        del y, memory
    assert candidates.known_fastest() == "torch"
    assert "WrongResult: its result is off by" in next(iter(_quack.LIBRARY.failures.values()))
    [entry] = _choices.read(_choices.facts(GPU)).values()  # it will be as wrong tomorrow
    assert entry["fastest"] == "torch"


def test_a_kernel_that_fails_later_gives_way_to_the_next(fakes):
    candidates = chosen_among()
    right = candidates.run()
    assert candidates.known_fastest() == "quack 64x144 split 4"
    fakes.epilogue("with_bias").fails = refusing(64, RuntimeError("CUDA error: launch failure"))
    assert_close(candidates.run(), right, 0.004)
    assert candidates.known_fastest() == "quack 128x144 split 4"
    calls = len(fakes.log)
    candidates.run()
    assert len(fakes.log) == calls + 1


def test_lack_of_memory_is_the_callers(fakes):
    candidates = chosen_among()
    candidates.run()
    fakes.epilogue("with_bias").fails = refusing(64, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        candidates.run()
    fakes.epilogue("with_bias").fails = lambda options: None
    candidates.run()
    assert fakes.log[-1][-1]["tile_M"] == 64


def test_a_choice_of_another_process_is_compiled_before_a_capture_has_it(fakes):
    chosen_among().run()
    another_process()
    fakes.forget()
    candidates = chosen_among()
    fakes.log.clear()
    fakes.capturing = True
    y = candidates.run()  # nothing is compiled in a capture: the default
    assert fakes.log == []
    assert_close(y, linear.reference(*(t.double() for t in product()[:3])), 0.004)
    with pytest.raises(LibraryError, match="before this CUDA graph's capture"):
        candidates.functions["quack 64x144 split 4"](*candidates.cold)
    assert _quack.LIBRARY.failures == {}
    fakes.capturing = False
    candidates.run()  # the run before a capture: the chosen alone, nothing is measured
    assert [call[-1]["split_k"] for call in fakes.log] == [4]
    fakes.capturing = True
    candidates.run()
    assert len(fakes.log) == 2


def test_one_device_or_shape_that_is_ready_does_not_vouch_for_another(fakes):
    few = chosen_among()
    few.run()
    more = chosen_among((numbers(2 * M, K), *product()[1:]))
    name = few.known_fastest()
    assert few.functions[name].ready()
    assert not more.functions[name].ready()


def test_other_versions_of_the_libraries_are_other_facts(monkeypatch):
    before = _choices._versions()
    monkeypatch.setattr(_choices, "_installed", lambda *names: "another")
    changed = {name for name, value in _choices._versions().items() if value != before[name]}
    assert changed >= {"quack", "flash_attn", "cutlass"}


def test_a_library_is_loaded_once(fakes):
    loads: list[int] = []
    library = Library("quack-kernels", "0.1", lambda: loads.append(1) or loads, lambda _: None)
    assert [library.unavailable(GPU) for _ in range(3)] == [None] * 3
    assert loads == [1]
    assert _flash_attention.LIBRARY.loaded is None
