"""`flowturbo bench`: latency, memory, the share of decoding, and profiles of plans."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from flowturbo_kernels import use_backend

from ..checks import positive
from ..models.flow_model import FlowModel, ReversedTime
from ..models.headers import Guided, named_plans
from ..models.load import load
from ..models.model_plans import find_unstaged
from ..models.random_weights import untrained
from ..models.sit import SIT_CONFIGS, SiT
from ..runtime import rng
from ..runtime.device import Dtype, choose_device, device_name, seconds
from ..runtime.streams import interactive
from ..sampling.compile import compile
from ..sampling.sampler import sample
from ..storage.files import write_text
from ..version import __version__


@dataclass(frozen=True)
class Bench(Guided):
    """Measure the latency of plans.

    Reports milliseconds per image, images per second, peak memory and the share of decoding, and
    with --profile also the time per operation.
    """

    model: str = "digits"
    """A .pt, .pth or .safetensors file with SiT's keys, "digits" or "emoji".
    Or a size such as "SiT-XL/2", which gets random weights.
    """
    refiner: str | None = None
    """The refiner's file. The bundled digits and random weights bring their own."""
    vae: str | None = None
    """Folder or hub name of a diffusers AutoencoderKL or AutoencoderTiny, "pixels" (grey) or "rgb".
    Default: the one that the model's file names.
    """
    image_size: int = 256
    """Height and width of the images, for random weights; those of the latents are an eighth."""
    plans: tuple[str, ...] = ("H1P5R3", "H8")
    """Plans to time: letters, .json files, or names of plans in the model's file."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Images per batch; each plan is timed at each size."""
    guidance: float | None = None
    """Guidance scale; 1 means none and halves the work.
    Default: what the model's file recommends, else 1.5.
    """
    repeats: int = 10
    """Timed runs of each plan and batch size; their median is reported."""
    graph: bool = True
    """Replay CUDA graphs, on a GPU. With --no-graph operations are launched one by one."""
    device: str | None = None
    """"cuda" or "cpu". Default: a GPU if there is one."""
    dtype: Dtype | None = None
    """Data type of the model. Default: bfloat16 on a GPU, float32 on the CPU."""
    backend: Literal["auto", "reference", "triton", "cuda"] = "auto"
    """Backend of the kernels."""
    quantize: Literal["fp8"] | None = None
    """"fp8" runs the predictor's matrix products in e4m3.
    The relative error of its velocity is reported.
    """
    out: Path | None = None
    """A .json file for the results."""
    profile: Path | None = None
    """Folder for a trace and a table of the time per operation, for each plan and batch size.
    Traces open in ui.perfetto.dev and chrome://tracing.
    """

    def __post_init__(self) -> None:
        named = named_plans(self.model, self.refiner)
        for plan in self.plans:
            find_unstaged(plan, named)
        for size in self.batch_sizes:
            positive("batch_sizes", size)
        if not self.plans or not self.batch_sizes:
            raise ValueError("plans and batch_sizes must name at least one each")
        positive("repeats", self.repeats)
        self.choose_guidance()
        if self.out is not None and self.out.suffix != ".json":
            raise ValueError(f"out must end in .json, got {str(self.out)!r}")


class Timing(NamedTuple):
    """The latency of one plan at one batch size, in seconds per batch.

    seconds, fastest, slowest: median and extremes of the timed runs.
    first_seconds: of the first run, with everything that it loads, compiles and captures.
    decode_seconds: of decoding alone, 0 without a decoder.
    peak_bytes: of device memory, weights included; None on the CPU, where torch does not count it.
    """

    plan: str
    batch: int
    seconds: float
    fastest: float
    slowest: float
    first_seconds: float
    decode_seconds: float
    peak_bytes: int | None


def bench(settings: Bench) -> str:
    """Run the benchmark; returns a Markdown table."""
    model = _model(settings)
    error = _quantized(model) if settings.quantize else None
    for folder in (settings.out and settings.out.parent, settings.profile):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    output: Literal["latents", "uint8"] = "latents" if model.vae is None else "uint8"
    model.captures.limit = (
        max(8, len(settings.plans) * len(settings.batch_sizes)) if settings.graph else 0
    )
    work = list(itertools.product(settings.plans, settings.batch_sizes))
    timings = []
    for plan, batch in tqdm(work, unit="run", leave=False, disable=not interactive()):
        timings.append(measure(model, plan, batch, settings.scale, output, settings.repeats))
        if settings.profile is not None:
            profile_run(model, plan, batch, settings.scale, output, settings.profile)
        model.captures.clear()
    environment = {
        "model": settings.model,
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "guidance": settings.scale,
        "output": output,
        "graph": settings.graph and model.device.type == "cuda",
        "backend": settings.backend,
        **({} if error is None else {"velocity error of fp8": float(f"{error:.3g}")}),
        "torch": torch.__version__,
        "flowturbo": __version__,
    }
    if settings.out is not None:
        write_text(
            settings.out,
            json.dumps(
                {"environment": environment, "timings": [t._asdict() for t in timings]}, indent=1
            )
            + "\n",
        )
    return table(timings, environment)


def table(timings: list[Timing], environment: Mapping[str, Any]) -> str:
    """The timings as a Markdown table, below a line with their provenance."""
    lines = [
        ", ".join(f"{key} {value}" for key, value in environment.items()),
        "",
        "| plan | batch | ms/image | images/s | ms/batch (fastest, slowest) | first run, s | "
        "decoding | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for t in timings:
        memory = "" if t.peak_bytes is None else f"{t.peak_bytes / 2**20:.0f} MiB"
        share = f"{100 * t.decode_seconds / t.seconds:.0f} %" if t.decode_seconds else ""
        lines.append(
            f"| {t.plan} | {t.batch} | {1e3 * t.seconds / t.batch:.2f} | "
            f"{t.batch / t.seconds:.1f} | {1e3 * t.seconds:.2f} "
            f"({1e3 * t.fastest:.2f}, {1e3 * t.slowest:.2f}) | {t.first_seconds:.2f} | {share} | "
            f"{memory} |"
        )
    return "\n".join(lines)


def measure(
    model: FlowModel,
    plan: str,
    batch: int,
    guidance: float,
    output: Literal["latents", "uint8"],
    repeats: int = 10,
) -> Timing:
    """Time `sample` for one batch as a user calls it, drawing the noise included.

    The model's captures are dropped first, so that the peak memory is that of this plan at this
    batch size alone.
    """
    run = _run_of(model, plan, batch, guidance, output)
    cuda = model.device.type == "cuda"
    model.captures.clear()
    fresh_peak(model.device)

    def first() -> None:
        if model.captures.limit:
            compile(model, plan, batch, guided=guidance != 1, output=output)
        run()

    first_seconds = seconds(first, model.device)
    run()
    times = [seconds(run, model.device) for _ in range(repeats)]
    peak = torch.cuda.max_memory_reserved(model.device) if cuda else None
    decoding = 0.0
    if output == "uint8":
        latents = torch.randn(batch, *model.latent_shape, device=model.device, dtype=torch.float32)
        model.decode(latents)
        decoding = statistics.median(
            seconds(lambda: model.decode(latents), model.device) for _ in range(repeats)
        )
    return Timing(
        plan, batch, statistics.median(times), min(times), max(times), first_seconds, decoding, peak
    )


def fresh_peak(device: torch.device) -> None:
    """Release unused device memory and restart the measurement of the peak.

    Memory that torch freed but still reserves would count in the next peak. So would cuBLAS's
    workspaces, which it keeps for every stream that it ever ran on: 33 MiB each on Hopper.
    """
    gc.collect()
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # kernels in flight may still use what is released
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _run_of(
    model: FlowModel, plan: str, batch: int, guidance: float, output: Literal["latents", "uint8"]
) -> Callable[[], torch.Tensor]:
    labels = [i % model.num_classes for i in range(batch)]
    return lambda: sample(
        model, plan, labels, guidance=guidance, seed=0, batch_size=batch, output=output
    )


def profile_run(
    model: FlowModel,
    plan: str,
    batch: int,
    guidance: float,
    output: Literal["latents", "uint8"],
    folder: Path,
) -> str:
    """Profile one run; returns the table of the time per operation.

    The folder gets the table and the trace. The run follows a warm-up and uses no CUDA graph, in
    which kernels could not be assigned to operations.
    """
    limit, model.captures.limit = model.captures.limit, 0
    run = _run_of(model, plan, batch, guidance, output)
    cuda = model.device.type == "cuda"
    try:
        run()
        with profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        ) as trace:
            run()
            if cuda:
                torch.cuda.synchronize(model.device)
    finally:
        model.captures.limit = limit
    name = f"{Path(plan).stem}-batch{batch}"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "trace.json"
        trace.export_chrome_trace(str(path))
        path.replace(folder / f"{name}.trace.json")
    text = operations_table(trace.events() or [], cuda)
    write_text(folder / f"{name}.md", f"# {plan}, batch {batch}\n\n{text}\n")
    return text


def operations_table(events: Any, cuda: bool) -> str:
    """A Markdown table of the time per operation: this library's, and torch's outside of these.

    events: of torch.profiler. On CUDA an operation's time is that of the kernels and copies that
    it launched. Those without an operation are a row of their own, so that the rows add up to the
    device's total time.
    """

    def outermost(event: Any, ours: bool) -> bool:
        parent = event.cpu_parent
        while parent is not None:
            if parent.name.startswith("flowturbo::") or (
                not ours and parent.name.startswith("aten::")
            ):
                return False
            parent = parent.cpu_parent
        return True

    rows: dict[str, list[float]] = {}
    on_device = 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            # A user annotation repeats a marked range on the device's timeline; it is not work.
            on_device += 0.0 if event.is_user_annotation else event.time_range.elapsed_us()
            continue
        ours = event.name.startswith("flowturbo::")
        if (ours or event.name.startswith("aten::")) and outermost(event, ours):
            rows.setdefault(event.name, []).append(
                float(event.device_time_total if cuda else event.cpu_time_total)
            )
    assigned = sum(sum(times) for times in rows.values())
    total = max(assigned, on_device) if cuda else assigned
    where = "on the device" if cuda else "on the CPU"
    lines = [
        f"Milliseconds {where}, of one run without a CUDA graph.",
        "",
        "| operation | calls | ms | share |",
        "|---|--:|--:|--:|",
    ]

    def row(name: str, calls: int | str, time: float) -> str:
        return (
            f"| {name} | {calls} | {time / 1e3:.3f} | {100 * time / total if total else 0:.1f} % |"
        )

    for name, times in sorted(rows.items(), key=lambda item: -sum(item[1])):
        lines.append(row(name, len(times), sum(times)))
    if total - assigned > 1e-3 * total:  # times are rounded to nanoseconds
        lines.append(row("outside all operations", "", total - assigned))
    lines.append(f"| all | {sum(map(len, rows.values()))} | {total / 1e3:.3f} | |")
    return "\n".join(lines)


def _model(settings: Bench) -> FlowModel:
    options: dict[str, Any] = dict(device=settings.device, backend=settings.backend)
    if settings.dtype:
        options["dtype"] = getattr(torch, settings.dtype)
    if settings.model not in SIT_CONFIGS:
        return load(settings.model, settings.refiner, settings.vae, **options)
    if settings.refiner is not None:
        raise ValueError(f"refiner must be left out for random weights, got {settings.refiner!r}")
    predictor, refiner = untrained(
        settings.model, settings.image_size, choose_device(settings.device)
    )
    return load(predictor, refiner, settings.vae, **options)


@torch.no_grad()
def _quantized(model: FlowModel) -> float:
    """Quantise the predictor in place; returns the relative error of its velocity.

    The error is measured on pure noise, at eight times t.
    """
    sit = model.predictor.network if isinstance(model.predictor, ReversedTime) else model.predictor
    if not isinstance(sit, SiT):
        raise ValueError(f"quantize needs a SiT, got {type(sit).__name__}")
    count = 8
    x = rng.noise(model.latent_shape, 0, range(count)).to(model.device, model.dtype)
    t = (torch.arange(count, device=model.device) + 0.5) / count
    labels = torch.arange(count, device=model.device) % model.num_classes
    with use_backend(model.backend):
        plain = model.predictor(x, t, labels).double()
        sit.quantize_(model.predictor)
        return float((model.predictor(x, t, labels).double() - plain).norm() / plain.norm())
