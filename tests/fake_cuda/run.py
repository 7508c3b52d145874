"""Run a command on the stand-in for a CUDA device: python tests/fake_cuda/run.py [--device H100]
[--memory MIB] COMMAND...

It is built by g++ when it is first needed, for the torch of the Python that runs this, which must
be a CUDA build. The command's own exit status is given back; if it is 0 and some process did what
CUDA forbids without taking note of it, 1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEVICES = ("H100", "H200", "A100", "RTX4090")
FAMILIES = ("__cuda", "cuda", "cublas", "cudnn", "cupti")
"""Names of functions that begin so are ours: an implementation, or a stub that says it is
missing.
"""
STATUS = {"cublas": 15, "cudnn": 3000, "cupti": 27}
"""What a missing function of the family returns: "not supported". cudart's is 801."""


def build() -> Path:
    """The folder with libcuda.so.1, built anew if the sources, or torch, are others."""
    site = Path(sysconfig.get_path("purelib"))
    sources = sorted(HERE.glob("*.cpp"))
    torch_version = next(site.glob("torch-*.dist-info")).name
    text = (
        "".join(p.read_text() for p in [*sources, *sorted(HERE.glob("*.h")), Path(__file__)])
        + str(site)
        + torch_version
    )
    cache = Path(
        os.environ.get("FAKE_CUDA_BUILD")
        or Path(tempfile.gettempdir()) / f"fake_cuda-{os.getuid()}"
    )
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    if (folder / "libcuda.so.1").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        work = Path(temporary)
        includes = [f"-I{path}" for path in headers(site)]
        objects = []
        running = []
        for source in sources:
            objects.append(str(work / f"{source.stem}.o"))
            running.append(
                subprocess.Popen(
                    [
                        "g++",
                        "-O2",
                        "-std=c++17",
                        "-fPIC",
                        *includes,
                        "-c",
                        str(source),
                        "-o",
                        objects[-1],
                    ]
                )
            )
        if any(process.wait() for process in running):
            raise SystemExit("the stand-in for a CUDA device could not be compiled")
        stubs = work / "missing.cpp"
        stubs.write_text(missing(site, objects))
        library = work / "libcuda.so.1"
        how = [
            "-O1",
            "-std=c++17",
            "-fPIC",
            "-shared",
            "-fno-builtin",
            f"-I{HERE}",
            "-Wl,-soname,libcuda.so.1",
        ]
        subprocess.run(
            ["g++", *how, "-o", str(library), str(stubs), *objects, "-ldl", "-lpthread"], check=True
        )
        folder.mkdir(exist_ok=True)
        os.replace(library, folder / "libcuda.so.1")
    return folder


def headers(site: Path) -> list[Path]:
    """CUDA's headers: of torch's packages, and crt/ of a toolkit or of NVIDIA's own package."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    folders = [
        home / "include",
        *site.glob("nvidia/cu*/include"),
        *site.glob("nvidia/cudnn/include"),
    ]
    return [folder for folder in folders if folder.is_dir()]


def missing(site: Path, objects: list[str]) -> str:
    """Stubs of all functions of these families that torch asks for and the sources don't have."""
    libraries = [
        *(site / "torch" / "lib").glob("libtorch*.so"),
        *(site / "torch" / "lib").glob("libc10*.so"),
    ]
    asked = symbols(["nm", "-D", "--undefined-only", *map(str, libraries)])
    there = symbols(["nm", "--defined-only", *objects])
    lines = ['#include "stand_in.h"']
    for name in sorted(asked - there):
        family = next((f for f in FAMILIES if name.startswith(f)), None)
        if family:
            status = STATUS.get(family, 801)
            lines.append(
                f'API int {name}(...) {{ return fake::violation("{name} is not in the stand-in"), '
                f"{status}; }}"
            )
    return "\n".join(lines) + "\n"


def symbols(command: list[str]) -> set[str]:
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        found.split("@")[0] for line in text.splitlines() if (found := re.sub(r".* ", "", line))
    }


def environment(folder: Path, device: str, memory: int | None) -> dict[str, str]:
    """What a process needs in order to run on the stand-in."""
    set_here = {
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":"),
        "FAKE_CUDA": device,
        # The extension brings no CUDA runtime of its own, which would look for a real driver.
        "NVCC_APPEND_FLAGS": "-cudart none",
        **({} if memory is None else {"FAKE_CUDA_MEMORY": str(memory)}),
    }
    return {**os.environ, **set_here}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument(
        "--memory", type=int, help="of the device, in MiB; left out: what such a device has"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.command:
        parser.error("a command must be given")
    folder = build()
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report"
        env = environment(folder, options.device, options.memory) | {
            "FAKE_CUDA_REPORT": str(report)
        }
        status = subprocess.run(options.command, env=env).returncode
        if report.exists():
            print(f"What CUDA forbids was done:\n{report.read_text()}", file=sys.stderr, end="")
            return status or 1
    return status


if __name__ == "__main__":
    sys.exit(main())
