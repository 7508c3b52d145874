"""csrc's kernels compiled for the GPU at hand at their first use, by CuPy's NVRTC, which keeps them on disk."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

FILES = {"adaln": "adaln.cu", "velocity_update": "velocity_update.cu"} | dict.fromkeys(
    ("group_norm_statistics", "group_norm_apply"), "group_norm_silu.cu"
)


def sources() -> Path:
    """The folder of csrc: inside the installed package, or beside it in a checkout. OSError if there is none."""
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError("csrc is neither inside flowturbo_kernels nor beside it")


def options() -> tuple[str, ...]:
    """Without the architecture. CUDA's number types come with CuPy's or, where those are not installed, with Triton's headers."""
    found = importlib.util.find_spec("triton")
    triton = (
        []
        if found is None
        else [f"-I{Path(p) / 'backends' / 'nvidia' / 'include'}" for p in found.submodule_search_locations or ()]
    )
    return "-std=c++17", "-default-device", f"-I{sources()}", *triton


class Launcher:
    """launch(name, grid, threads, shared, args, stream), as the extension's, on the current device. ImportError without CuPy."""

    def __init__(self) -> None:
        importlib.import_module("cupy")
        self.options = options()

    def __call__(self, name: str, grid: tuple[int, ...], threads: int, shared: int, args: bytes, stream: int) -> None:
        from cupy_backends.cuda.api import driver

        struct = ctypes.create_string_buffer(args, len(args))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        x, y, z = (*grid, 1, 1)[:3]
        driver.launchKernel(
            self._function(name).kernel.ptr, x, y, z, threads, 1, 1, shared, stream, ctypes.addressof(pointers), 0
        )  # fmt: skip

    @functools.cache  # noqa: B019 (there is one launcher a process and kind of GPU)
    def _function(self, name: str) -> Any:
        import cupy

        return cupy.RawModule(code=source(name), options=self.options, name_expressions=(name,)).get_function(name)


def source(name: str) -> str:
    """The text of the file that holds the kernel of that instance."""
    return (sources() / FILES[name.split("::")[1].split("<")[0]]).read_text()
