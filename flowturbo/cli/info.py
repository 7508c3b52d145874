"""`flowturbo info`: versions, devices and kernel backends, to paste into a bug report; a model."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform

import torch

from flowturbo_kernels import LIBRARIES, OPS, BackendError, requested_backend

from ..models.load import load
from ..models.model_plans import calls
from ..models.pipelines import is_pipeline
from ..runtime.cpu_dtype import bfloat16_advice
from ..runtime.device import device_name


def report() -> str:
    """Versions, devices, the CUDA extension, and the backend of every operation with its reason."""
    lines = [
        f"flowturbo {_version('flowturbo')}, Python {platform.python_version()}, "
        f"{platform.platform()}",
        f"torch {torch.__version__} ({torch.get_num_threads()} threads), CUDA of its build: "
        f"{torch.version.cuda or 'none'}",
        f"devices: {_devices()}",
        *(f"{name} {_version(name)}" for name in ("triton", "diffusers", "scikit-learn")),
        f"cupy {_version('cupy-cuda13x', 'cupy-cuda12x')}",
        *(f"{name} {library.describe(_device())}" for name, library in LIBRARIES.items()),
        f"CUDA extension: {_extension()}",
        f"bfloat16 on the CPU: {bfloat16_advice()}",
        "",
        f"{'operation':<31} {'backend':<10} why",
        *map(_backend, sorted(OPS)),
    ]
    return "\n".join(lines)


def of_model(source: str) -> str:
    """What a model is, its guidance, its licence, its plans and its classes, one a line."""
    if is_pipeline(source):
        raise ValueError(
            f"model must be a model of classes, a .pt, .pth or .safetensors file, got {source!r}"
        )
    model = load(source, device="cpu")
    shape = " x ".join(map(str, model.latent_shape))
    refiner = "a refiner" if model.refiner is not None else "no refiner"
    lines = [f"{source}: {model.num_classes} classes, latents of {shape}, {refiner}"]
    if model.guidance is not None:
        lines.append(f"guidance: {model.guidance:g}, as its file recommends")
    if model.license is not None:
        lines.append(f"licence: {model.license}")
    if model.plans:
        lines.append("plans:")
        lines += [f"  {name}: {plan}, {calls(plan)}" for name, plan in model.plans.items()]
    if model.class_names is None:
        lines.append(f"classes: 0 to {model.num_classes - 1}, without names")
    else:
        lines.append("classes:")
        lines += [f"{number:6}  {name}" for number, name in enumerate(model.class_names)]
    return "\n".join(lines)


def _backend(name: str) -> str:
    """The backend of an operation on this machine, and why those before it are not used."""
    device = _device()
    args = next(
        iter(
            OPS[name].example(lambda *shape: torch.zeros(shape, dtype=torch.float32, device=device))
        )
    )
    try:
        backend, refusals = OPS[name].why(*args)
    except BackendError as error:
        return f"{name:<31} none       {error}"
    reasons = "; ".join(f"{other}: {reason}" for other, reason in refusals.items())
    if not reasons:
        reasons = "first available" if requested_backend() == "auto" else "requested by name"
    return f"{name:<31} {backend:<10} {reasons}"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _devices() -> str:
    if not torch.cuda.is_available():
        return (
            f"cpu ({platform.processor() or platform.machine()}); no CUDA device that torch can use"
        )
    return ", ".join(device_name(torch.device("cuda", i)) for i in range(torch.cuda.device_count()))


def _extension() -> str:
    try:
        build = importlib.import_module("flowturbo_kernels._C").build_info()
    except ImportError as error:
        return f"not built ({error})"
    devices = (
        f"{build.devices} devices"
        if build.devices
        else f"no device ({build.problem or 'none found'})"
    )
    version = f"{build.cuda_version // 1000}.{build.cuda_version % 1000 // 10}"
    return (
        f"built with CUDA {version} for sm_{', sm_'.join(build.architectures.split())}; {devices}"
    )
