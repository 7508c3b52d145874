"""Whoever samples plans: this library and its rivals, each set up as its users would, on the same weights.

A rival is a function in RIVALS: subject -> sampler. All run the same solver steps on the same batch, in the dtype of the subject's
weights unless they say otherwise.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from decoder import Autoencoder
from plain_sit import PlainSiT
from torch import Tensor, nn

import flowturbo as ft
from flowturbo.job import Job
from flowturbo.latency import filled
from flowturbo.models import FlowModel
from flowturbo.models.fused_vae import fuse
from flowturbo.models.sit import SIT_CONFIGS, SiT, SiTConfig
from flowturbo.models.vae import DiffusersVAE

GUIDANCE = 1.5


class NotHere(Exception):
    """This rival can't run here, and why."""


@dataclass(frozen=True)
class Subject:
    """What is sampled: a predictor, its refiner and an autoencoder with random weights, on a device, a batch at a time."""

    predictor: SiT
    refiner: SiT
    vae: Autoencoder
    device: torch.device
    dtype: torch.dtype
    batch: int
    decode: bool

    @property
    def output(self) -> Any:
        return "uint8" if self.decode else "latents"


@functools.lru_cache(maxsize=1)
def networks(size: int, cuda: bool) -> tuple[SiT, SiT, Autoencoder]:
    """SiT-XL/2 with SD's decoder on a GPU, a small one elsewhere, in bfloat16 or float32."""
    device = torch.device("cuda" if cuda else "cpu")
    config = replace(SIT_CONFIGS["SiT-XL/2"], side=size // 8)
    if not cuda:
        config = SiTConfig(hidden=96, depth=2, heads=4, patch=2, side=size // 8)
    torch.manual_seed(0)
    with torch.device(device):
        vae = Autoencoder() if cuda else Autoencoder((16, 16, 32, 32), 1, 8)
    dtype = torch.bfloat16 if cuda else torch.float32
    nets = filled(config, device, 0), filled(config.refiner(), device, 1), vae.requires_grad_(False).eval()
    return tuple(net.to(dtype) for net in nets)  # type: ignore[return-value]


def subject(size: int, batch: int, decode: bool) -> Subject:
    nets = networks(size, torch.cuda.is_available())
    weight = nets[0].pos_embed
    return Subject(*nets, weight.device, weight.dtype, batch, decode)


Sampler = Callable[[str], Tensor]
"""A plan -> a batch sampled by it. The first call may compile and capture."""


def _labels(s: Subject) -> list[int]:
    return [i % 1000 for i in range(s.batch)]


def _sample(s: Subject, model: FlowModel, plan: str) -> Tensor:
    return ft.sample(model, plan, _labels(s), guidance=GUIDANCE, seed=0, batch_size=s.batch, output=s.output)


def _fused(s: Subject) -> FlowModel:
    vae = copy.deepcopy(s.vae)
    fuse(vae)
    return ft.load(s.predictor, s.refiner, DiffusersVAE(vae), device=s.device, dtype=s.dtype)


def ours(s: Subject) -> Sampler:
    """This library: fused kernels, modulations hoisted, the whole plan and the decoding in one CUDA graph."""
    model = _fused(s)
    prepared = set()

    def run(plan: str) -> Tensor:
        if plan not in prepared:
            ft.compile(model, plan, s.batch, output=s.output)
            prepared.add(plan)
        return _sample(s, model, plan)

    return run


def ours_fp8(s: Subject) -> Sampler:
    """This library with the predictor's products in fp8: another velocity, by some percent."""
    return ours(replace(s, predictor=copy.deepcopy(s.predictor).quantize_()))


def ours_eager(s: Subject) -> Sampler:
    """This library without graphs."""
    model = _fused(s)
    model.captures.limit = 0
    return functools.partial(_sample, s, model)


def _plain(
    s: Subject,
    wrap: Callable[[nn.Module], Any] = lambda network: network,
    dtype: torch.dtype | None = None,
    wrap_decoder: Callable[[nn.Module], Any] = lambda network: network,
) -> FlowModel:
    """The same sampler over plain networks, with torch's own operations."""
    dtype = dtype or s.dtype
    vae = copy.deepcopy(s.vae)
    vae.decoder = wrap_decoder(vae.decoder.to(memory_format=torch.channels_last))
    base = ft.load(s.predictor, s.refiner, DiffusersVAE(vae), device=s.device, dtype=s.dtype, backend="reference")
    predictor, refiner = (wrap(PlainSiT.of(network).to(dtype)) for network in (s.predictor, s.refiner))
    return replace(base, predictor=predictor, refiner=refiner, dtype=dtype)


def eager(s: Subject) -> Sampler:
    """Plain torch, weights in the dtype of the run."""
    return functools.partial(_sample, s, _plain(s))


def autocast(s: Subject) -> Sampler:
    """Plain torch with float32 weights under autocast, as the public code samples."""
    model = _plain(s, dtype=torch.float32)

    def run(plan: str) -> Tensor:
        with torch.autocast(s.device.type, dtype=torch.bfloat16):
            return _sample(s, model, plan)

    return run


def compiled(s: Subject) -> Sampler:
    """torch.compile with its defaults on each network: the paper's way."""
    torch._dynamo.reset()
    return functools.partial(_sample, s, _plain(s, torch.compile, wrap_decoder=torch.compile))


def max_autotune(s: Subject) -> Sampler:
    """torch.compile(mode="max-autotune"): tuned products and a CUDA graph for each network call."""
    torch._dynamo.reset()
    tuned = functools.partial(torch.compile, mode="max-autotune", fullgraph=True)
    return functools.partial(_sample, s, _plain(s, lambda n: _Cloned(tuned(n)), wrap_decoder=lambda n: _Cloned(tuned(n))))


class _Cloned(nn.Module):
    """A compiled network whose result outlives its next call: its CUDA graph writes to the same place again."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.network(*args).clone()


def plan_graph(s: Subject) -> Sampler:
    """The strongest: tuned and compiled without graphs, and then this library's own capture of the whole plan around it."""
    if s.device.type != "cuda":
        raise NotHere("CUDA graphs need a GPU")
    torch._dynamo.reset()
    tuned = functools.partial(torch.compile, mode="max-autotune-no-cudagraphs", fullgraph=True)
    model = _plain(s, tuned, wrap_decoder=tuned)
    noise = torch.randn(s.batch, *model.latent_shape, device=s.device)
    labels = torch.tensor(_labels(s), device=s.device)

    @torch.no_grad()
    def run(plan: str) -> Tensor:
        job = Job.of(model, ft.Plan.parse(plan), GUIDANCE, None, s.output, torch.float32)
        arguments = job.capture(model, {"noise": noise, "labels": labels}, GUIDANCE)
        if not any(capture.key == arguments[0] for capture in model.captures.report()):
            model.captures.ahead(*arguments)
        return model.captures.run(*arguments)

    return run


def diffusers(s: Subject) -> Sampler:
    """diffusers' transformer of the same size, compiled with defaults; its weights are its own."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise NotHere(f"diffusers is not installed ({error})") from None

    def transformer(config: SiTConfig) -> Any:
        with torch.device(s.device):
            network = DiTTransformer2DModel(
                num_attention_heads=config.heads,
                attention_head_dim=config.hidden // config.heads,
                in_channels=config.in_channels,
                out_channels=config.out_channels,
                num_layers=config.depth,
                sample_size=config.side,
                patch_size=config.patch,
                num_embeds_ada_norm=config.num_classes,
            )
        return torch.compile(_DiT(network.to(s.dtype).requires_grad_(False).eval(), config.channels))

    torch._dynamo.reset()
    model = _plain(s, wrap_decoder=torch.compile)
    model = replace(model, predictor=transformer(s.predictor.config), refiner=transformer(s.refiner.config))
    return functools.partial(_sample, s, model)


class _DiT(nn.Module):
    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network, self.channels = network, channels

    def forward(self, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
        x = x if v is None else torch.cat([x, v], dim=1)
        return self.network(x, timestep=t, class_labels=y).sample[:, : self.channels]


RIVALS: dict[str, Callable[[Subject], Sampler]] = {
    "ours": ours,
    "ours-eager": ours_eager,
    "ours-fp8": ours_fp8,
    "autocast": autocast,
    "eager": eager,
    "compile": compiled,
    "max-autotune": max_autotune,
    "plan-graph": plan_graph,
    "diffusers": diffusers,
}
