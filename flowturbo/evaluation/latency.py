"""How long plans take: milliseconds, memory, the share of decoding, and where the time goes."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
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

from ..checks import finite, positive
from ..models.flow_model import FlowModel, ReversedTime
from ..models.load import load
from ..models.random_weights import untrained
from ..models.sit import SIT_CONFIGS, SiT
from ..runtime import rng
from ..runtime.device import Dtype, choose_device, device_name, seconds
from ..sampling.compile import compile
from ..sampling.sampler import sample
from ..solver.plan import as_plan
from ..storage.files import write_text
from ..version import __version__


@dataclass(frozen=True)
class Bench:
    """Time plans of a model: milliseconds an image, images a second, memory, and the share of
    decoding.

    With --profile, also where the time goes.
    """

    model: str = "digits"
    """A .pt, .pth or .safetensors file with SiT's keys, "digits", or a size such as "SiT-XL/2":
    random weights.
    """
    refiner: str | None = None
    """The refiner's file; the bundled model and random weights bring their own."""
    vae: str | None = None
    """Folder or hub name of a diffusers AutoencoderKL or AutoencoderTiny, or "pixels"; left out:
    what the model's file names.
    """
    image_size: int = 256
    """Height and width of the images, for random weights; latents are an eighth."""
    plans: tuple[str, ...] = ("H1P5R3", "H8")
    """Plans to time."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Images at a time."""
    guidance: float = 1.5
    """Guidance scale; 1 is none, and halves the work."""
    repeats: int = 10
    """Timed runs of each; their median counts."""
    graph: bool = True
    """On CUDA: replay a CUDA graph; --no-graph runs operation by operation."""
    device: str | None = None
    """"cuda" or "cpu"; left out: a GPU if there is one."""
    dtype: Dtype | None = None
    """Left out: bfloat16 on a GPU, float32 on the CPU."""
    backend: Literal["auto", "reference", "triton", "cuda"] = "auto"
    """Which kernels run."""
    quantize: Literal["fp8"] | None = None
    """"fp8" for the predictor's products in e4m3; how far that changes its velocity is told."""
    out: Path | None = None
    """A .json file for the figures."""
    profile: Path | None = None
    """A folder for a trace (to open in ui.perfetto.dev or chrome://tracing) and a table of time per
    operation of each run.
    """

    def __post_init__(self) -> None:
        for plan in self.plans:
            as_plan(plan)
        for size in self.batch_sizes:
            positive("batch_sizes", size)
        if not self.plans or not self.batch_sizes:
            raise ValueError("plans and batch_sizes must name at least one each")
        positive("repeats", self.repeats)
        finite("guidance", self.guidance)
        if self.out is not None and self.out.suffix != ".json":
            raise ValueError(f"out must end in .json, got {str(self.out)!r}")


class Timing(NamedTuple):
    """One plan at one batch size. seconds: of a run of the whole batch, the median, with the
    fastest and slowest beside it.

    first_seconds: of the first run, with all that is loaded, compiled and captured for it.
    decode_seconds: of decoding alone; 0 without. peak_bytes: of device memory, weights included;
        None on the CPU, where torch does not count it.
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
    """Run the benchmark -> a Markdown table."""
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
    for plan, batch in tqdm(work, unit="run", leave=False, disable=not sys.stderr.isatty()):
        timings.append(measure(model, plan, batch, settings.guidance, output, settings.repeats))
        if settings.profile is not None:
            profile_run(model, plan, batch, settings.guidance, output, settings.profile)
        model.captures.clear()
    environment = {
        "model": settings.model,
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "guidance": settings.guidance,
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
    what = ", ".join(f"{key} {value}" for key, value in environment.items())
    lines = [
        what,
        "",
        "| plan | batch | ms an image | images a second | ms a batch (fastest, slowest) | first "
        "run, s | decoding | peak memory |",
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
    """Time `sample` of one batch, as a user calls it, noise and labels included.

    The model's captures are given up before: memory is counted of this plan at this batch size
    alone.
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
        latents = torch.randn(batch, *model.latent_shape, device=model.device)
        model.decode(latents)
        decoding = statistics.median(
            seconds(lambda: model.decode(latents), model.device) for _ in range(repeats)
        )
    return Timing(
        plan, batch, statistics.median(times), min(times), max(times), first_seconds, decoding, peak
    )


def fresh_peak(device: torch.device) -> None:
    """Give the device back what nothing uses any more, and count the peak of its memory from there
    on.

    Memory that was freed, but is still reserved, would be in the next peak, and so would the
    workspaces that cuBLAS keeps for every stream that ever multiplied, of 33 MiB each on Hopper.
    """
    gc.collect()
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # what is given back may be in use until then
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
    """Trace one run -> the table of time per operation, which is also written to the folder, beside
    the trace.

    It runs without a graph, whose kernels could not be told apart by operation, and after a run
    that warms up.
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
        written = Path(temporary) / "trace.json"
        trace.export_chrome_trace(str(written))
        written.replace(folder / f"{name}.trace.json")
    text = operations_table(trace.events() or [], cuda)
    write_text(folder / f"{name}.md", f"# {plan}, batch {batch}\n\n{text}\n")
    return text


def operations_table(events: Any, cuda: bool) -> str:
    """Time per operation of this library, then of torch's own outside them, of all that the
    profiler saw.

    events: of torch.profiler. On CUDA an operation's time is that of the kernels and copies that
    were launched in it; those that no operation launched are a row of their own, so that all is the
    device's whole time.
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
            # A range that is marked on the device's timeline too has its operation's name, and is
            # no work.
            on_device += 0.0 if event.is_user_annotation else event.time_range.elapsed_us()
            continue
        ours = event.name.startswith("flowturbo::")
        if (ours or event.name.startswith("aten::")) and outermost(event, ours):
            rows.setdefault(event.name, []).append(
                float(event.device_time_total if cuda else event.cpu_time_total)
            )
    known = sum(sum(times) for times in rows.values())
    total = max(known, on_device) if cuda else known
    where = "on the device" if cuda else "on the CPU"
    lines = [
        f"Milliseconds {where}, of one run without a graph.",
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
    if total - known > 1e-3 * total:  # times are rounded to nanoseconds
        lines.append(row("outside all operations", "", total - known))
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
    """Quantise the predictor in place -> the relative error of its velocity, at eight times, on
    pure noise.
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
        sit.quantize_()
        return float((model.predictor(x, t, labels).double() - plain).norm() / plain.norm())
