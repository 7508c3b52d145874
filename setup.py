"""Builds the CUDA extension flowturbo_kernels._C where there is an nvcc; everything else is in
pyproject.toml.

FLOWTURBO_BUILD_CUDA=0 never builds it, =1 fails without nvcc; unset, it is built if nvcc is found.
FLOWTURBO_CUDA_ARCHS="80;90a" names the architectures instead of those that nvcc knows of the
default list. The extension includes no torch header: its interface is pointers, sizes and a stream.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ARCHS = ("80", "86", "89", "90a", "100a")
NVCC_FLAGS = "-O3 -std=c++17 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden -Icsrc"


def find_nvcc() -> str | None:
    setting = os.environ.get("FLOWTURBO_BUILD_CUDA", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(f"FLOWTURBO_BUILD_CUDA must be 0, 1 or unset, got {setting!r}")
    if setting == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if nvcc is None and setting == "1":
        raise SystemExit("FLOWTURBO_BUILD_CUDA=1, but there is no nvcc on PATH nor under CUDA_HOME")
    return nvcc


def architectures(nvcc: str) -> list[str]:
    if archs := os.environ.get("FLOWTURBO_CUDA_ARCHS"):
        return archs.split(";")
    listing = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, encoding="utf-8"
    ).stdout
    known = re.findall(r"compute_(\d+)", listing)
    return [arch for arch in ARCHS if arch.rstrip("a") in known]


class NinjaBuild(build_ext):
    """Every source to an object in parallel, then one link by nvcc, which brings the CUDA runtime
    in statically.
    """

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc = find_nvcc()
        assert nvcc is not None
        archs = architectures(nvcc)
        code = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
        includes = " ".join(
            f"-I{p}" for p in (sysconfig.get_path("include"), pybind11.get_include())
        )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        temp = Path(self.build_temp).resolve()
        for folder in (target.parent, temp):
            folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"builddir = {temp}",
            f"rule compile\n  command = {nvcc} {NVCC_FLAGS} {includes} {code} "
            f"-DFLOWTURBO_ARCHS='\"{' '.join(archs)}\"' "
            "-MD -MF $out.d -c $in -o $out\n  depfile = $out.d",
            f"rule link\n  command = {nvcc} -shared {code} $in -o $out",
        ]
        objects = []
        for source in ext.sources:
            objects.append(str(temp / (Path(source).name + ".o")))
            lines.append(f"build {objects[-1]}: compile {source}")
        lines.append(f"build {target}: link {' '.join(objects)}")
        script = temp / "build.ninja"
        script.write_text("\n".join(lines) + "\n", encoding="utf-8")
        subprocess.run([sys.executable, "-m", "ninja", "-f", str(script)], cwd=ROOT, check=True)


sources = sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.c*") if p.suffix in (".cpp", ".cu")
)
if sources and find_nvcc():
    setup(
        ext_modules=[Extension("flowturbo_kernels._C", sources)], cmdclass={"build_ext": NinjaBuild}
    )
else:
    setup()
