"""csrc's kernels compiled at first use for the GPU at hand, by CuPy's NVRTC, and cached on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch

from ._cache import cache_folder, write_atomically

FILES = {"adaln": "adaln.cu", "velocity_update": "velocity_update.cu"} | dict.fromkeys(
    ("group_norm_statistics", "group_norm_merge", "group_norm_apply"), "group_norm_silu.cu"
)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_: ClassVar[Any] = [
        ("id", ctypes.c_int),
        ("filler", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    ]


_DEPENDENT = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_: ClassVar[Any] = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


def sources() -> Path:
    """The folder of csrc: inside the installed package, or beside it in a checkout. OSError if
    there is none.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError("csrc is neither inside flowturbo_kernels nor beside it")


def options() -> tuple[str, ...]:
    """Of the compiler, but for the architecture. The headers of CUDA's number types come with CuPy
    or, where it has none, with Triton.
    """
    spec = importlib.util.find_spec("triton")
    folders = (spec.submodule_search_locations if spec else None) or ()
    triton = [f"-I{Path(folder) / 'backends' / 'nvidia' / 'include'}" for folder in folders]
    return "-std=c++17", "-default-device", f"-I{sources()}", *triton


class Launcher:
    """launch(name, grid, threads, shared, args, stream, dependent) on the current device, as the
    extension has it. ImportError without CuPy.

    Of CuPy it uses NVRTC and the driver alone: CuPy's runtime would be a second one beside torch's.
    The driver's launch with attributes, which CuPy does not have, is called by ctypes.
    """

    def __init__(self) -> None:
        importlib.import_module("cupy")
        self.options = options()
        self._functions: dict[tuple[int, str], int] = {}

    def __call__(
        self,
        name: str,
        grid: tuple[int, ...],
        threads: int,
        shared: int,
        args: bytes,
        stream: int,
        dependent: bool,
    ) -> None:
        from cupy_backends.cuda.api import driver

        if not driver.ctxGetCurrent():
            # The thread's first call: torch's runtime makes the context current, while the driver
            # would not.
            torch.cuda.mem_get_info()
        struct = ctypes.create_string_buffer(args, len(args))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        function = ctypes.c_void_p(self._function(torch.cuda.current_device(), name))
        config = _Config((*grid, 1, 1)[:3], (threads, 1, 1), shared, stream)
        if dependent and waits(torch.cuda.get_device_capability()):
            attributes = (_Attribute * 1)(_Attribute(_DEPENDENT, 0, 1))
            config.attributes, config.count = attributes, 1
        status = _driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
        if status:
            raise RuntimeError(f"{name}: {driver.CUDADriverError(status)}")

    def _function(self, device: int, name: str) -> int:
        """The kernel's handle on that device, loaded at first use and never unloaded."""
        from cupy_backends.cuda.api import driver

        if (device, name) not in self._functions:
            lowered, code = compiled(name, torch.cuda.get_device_capability(device), self.options)
            self._functions[device, name] = driver.moduleGetFunction(
                driver.moduleLoadData(code), lowered
            )
        return self._functions[device, name]


@functools.cache
def _driver() -> Any:
    """CUDA's driver, which torch and CuPy have loaded by this name."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def compiled(name: str, capability: tuple[int, int], flags: tuple[str, ...]) -> tuple[str, bytes]:
    """(the kernel's lowered name, its machine code for such a GPU, or PTX where NVRTC is older than
    the GPU), from the disk or compiled and written there.

    RuntimeError, with the compiler's log, if it does not compile.
    """
    from cupy.cuda import nvrtc

    arch = _compiled_for(capability)
    exact = arch == 10 * capability[0] + capability[1]
    target = f"-arch={'sm' if exact else 'compute'}_{arch}"
    text = "".join(
        path.read_text(encoding="utf-8") for path in sorted(sources().glob("*.*h"))
    ) + source(name)
    key = repr((name, target, flags, nvrtc.getVersion(), text))
    file = cache_folder() / "nvrtc" / f"{hashlib.sha256(key.encode()).hexdigest()}.bin"
    try:
        digest, lowered, code = file.read_bytes().split(b"\n", 2)
        if digest.decode() == hashlib.sha256(code).hexdigest():
            return lowered.decode(), code
    except (OSError, ValueError):
        pass
    program = nvrtc.createProgram(source(name), "source.cu", [], [])
    try:
        nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*flags, target))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(
                f"{name} does not compile for {target}: {nvrtc.getProgramLog(program)}"
            ) from error
        lowered = nvrtc.getLoweredName(program, name)
        code = nvrtc.getCUBIN(program) if "sm_" in target else nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)
    write_atomically(file, f"{hashlib.sha256(code).hexdigest()}\n{lowered}\n".encode() + code)
    return lowered, code


@functools.cache
def waits(capability: tuple[int, int]) -> bool:
    """Whether code for such a GPU waits for the kernels before it, as a kernel must that is
    launched while they run. What an NVRTC without sm_90 compiles does not.
    """
    return _compiled_for(capability) >= 90


def _compiled_for(capability: tuple[int, int]) -> int:
    """The architecture of such a GPU, or the newest before it that NVRTC knows."""
    from cupy.cuda import nvrtc

    arch = 10 * capability[0] + capability[1]
    return int(max(known for known in nvrtc.getSupportedArchs() if known <= arch))


def source(name: str) -> str:
    """The text of the file with that instance's kernel."""
    return (sources() / FILES[name.split("::")[1].split("<")[0]]).read_text(encoding="utf-8")
