"""Whoever samples plans: this library and its rivals, each set up as its users would, on the same
weights.

A rival is a function in RIVALS: subject -> sampler. All run the same solver steps on the same
batch, in the dtype of the subject's weights unless they say otherwise.

What is timed, of everyone the same: one batch from noise and labels on the device to latents or
images there, until the device is idle, by the loop that flowturbo.sample runs. In it are the host's
part of that loop and, where the plan is a graph, the copies into and out of its buffers. Not in it:
making noise and labels and checking them, which flowturbo.sample does for all alike and `flowturbo
bench` times; loading, compiling, tuning and capturing, which setting a rival up and its first call
pay. cuDNN tunes convolutions for everyone.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import inductor
import rowwise
import torch
from decoder import Whole
from plain_sit import HoistedSiT, PlainSiT
from sampling import AnyJob, Sampler, captured, plainly, sample, tuned_convolutions
from subjects import Subject
from torch import Tensor, nn

import flowturbo as ft
from flowturbo.models.flow_model import FlowModel
from flowturbo.models.sit import SiTConfig
from flowturbo.models.vae import DiffusersVAE
from flowturbo.models.vae_fusion import fuse
from flowturbo.runtime.device import seconds


class Unavailable(Exception):
    """This rival can't run here, and why."""


# This library


def _fused(s: Subject) -> FlowModel:
    vae = copy.deepcopy(s.vae)
    fuse(vae)
    return ft.load(s.predictor, s.refiner, DiffusersVAE(vae), device=s.device, dtype=s.dtype)


def ours(s: Subject) -> Sampler:
    """This library: fused kernels, modulations hoisted, the whole plan and the decoding in one CUDA
    graph.
    """
    return captured(s, _fused(s))


def ours_fp8(s: Subject) -> Sampler:
    """This library with the predictor's products in fp8: another velocity, by some percent."""
    if s.device.type == "cuda":
        _need_fp8(s)
    return ours(replace(s, predictor=copy.deepcopy(s.predictor).quantize_()))


def ours_eager(s: Subject) -> Sampler:
    """This library without graphs."""
    model = _fused(s)
    model.captures.limit = 0
    return plainly(s, model)


def _need_fp8(s: Subject) -> None:
    if s.device.type != "cuda":
        raise Unavailable("scaled products in fp8 need a GPU of sm_89 or later")
    major, minor = torch.cuda.get_device_capability(s.device)
    if (major, minor) < (8, 9):
        raise Unavailable(
            "scaled products in fp8 need a GPU of sm_89 or later, and this one is "
            f"sm_{major}{minor}"
        )


# Plain torch

Wrap = Callable[[nn.Module], Any]


def _as_it_is(network: nn.Module) -> nn.Module:
    return network


def _plain(
    s: Subject, wrap: Wrap, vae: DiffusersVAE, dtype: torch.dtype | None = None, fp8: bool = False
) -> tuple[FlowModel, str]:
    """The same sampler over plain networks, with torch's own operations, and in words who does
    their products in fp8.
    """
    base = ft.load(s.predictor, s.refiner, vae, device=s.device, dtype=s.dtype, backend="reference")
    predictor, refiner = (
        PlainSiT.of(network).to(dtype or s.dtype) for network in (s.predictor, s.refiner)
    )
    by = rowwise.quantise(predictor) if fp8 else ""
    return replace(
        base, predictor=wrap(predictor), refiner=wrap(refiner), dtype=dtype or s.dtype
    ), by


def _decoder_of(
    s: Subject, wrap: Wrap = _as_it_is, layout: torch.memory_format = torch.channels_last
) -> DiffusersVAE:
    return DiffusersVAE(Whole.of(s.vae, layout, wrap))


def _faster_decoder(s: Subject, wrap: Wrap = _as_it_is) -> tuple[DiffusersVAE, str]:
    """torch's own convolutions are faster in NHWC and its GroupNorm in NCHW: both are timed, and
    the faster is kept.
    """
    if not s.decode:
        return _decoder_of(s, wrap), ""
    found = {}
    for name, layout in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
        vae = _decoder_of(s, wrap, layout)
        with torch.inference_mode(), tuned_convolutions():
            vae.decode(s.noise)
            found[name] = (
                statistics.median(
                    seconds(lambda vae=vae: vae.decode(s.noise), s.device) for _ in range(3)
                ),
                layout,
            )
    name = min(found, key=lambda name: found[name][0])
    times = ", ".join(f"{key} {1e3 * took:.3g}" for key, (took, _) in found.items())
    return _decoder_of(s, wrap, found[name][1]), f"decoder in {name} (ms a batch: {times})"


def eager(s: Subject) -> Sampler:
    """Plain torch, weights in the dtype of the run, in inference mode."""
    vae, settings = _faster_decoder(s)
    model, _ = _plain(s, _as_it_is, vae)
    return Sampler(s, torch.inference_mode()(functools.partial(sample, model)), model, settings)


def reference(s: Subject) -> Sampler:
    """Plain torch as it comes: not timed, but what everyone's latents and images are compared
    with.
    """
    model, _ = _plain(s, _as_it_is, _decoder_of(s))
    return Sampler(s, torch.inference_mode()(functools.partial(sample, model)), model)


def autocast(s: Subject) -> Sampler:
    """Plain torch with float32 weights under autocast to bfloat16, as the public code samples;
    decoding is eager's, without it.

    Autocast casts a weight once a context if it requires gradients, and in every call if not. Here
    one context holds a batch.
    """
    vae, settings = _faster_decoder(s, _NoCast)
    model, _ = _plain(s, _casting, vae, torch.float32)

    def run(s: Subject, plan: str) -> Tensor:
        with torch.autocast(s.device.type, dtype=torch.bfloat16), torch.no_grad():
            return sample(model, s, plan)

    return Sampler(s, run, model, settings)


def _casting(network: Any) -> Any:
    """The network with autocast in its calls, since a model's runs turn the caller's off.

    Casts are kept until the outermost context ends, which is the batch's.
    """
    own = network.requires_grad_(True).forward

    def forward(*args: Any, **options: Any) -> Any:
        with torch.autocast(args[0].device.type, dtype=torch.bfloat16):
            return own(*args, **options)

    network.forward = forward
    return network


class _NoCast(nn.Module):
    """A network that autocast leaves alone: it would have GroupNorm read and write float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return self.network(z)


# Compiled torch


def compiled(s: Subject) -> Sampler:
    """torch.compile with its defaults on each network: the paper's way."""
    torch._dynamo.reset()
    tuned = functools.partial(torch.compile, dynamic=False)
    model, _ = _plain(s, tuned, _decoder_of(s, tuned))
    return plainly(s, model)


def max_autotune(s: Subject, fp8: bool = False) -> Sampler:
    """torch.compile(mode="max-autotune") at its best: tuned products and a CUDA graph for each
    network call.
    """
    torch._dynamo.reset()
    tuned, settings = inductor.best(graphs=True)

    def wrap(network: nn.Module) -> nn.Module:
        return _Cloned(tuned(network))

    model, by = _plain(s, wrap, _decoder_of(s, wrap), fp8=fp8)
    return plainly(s, model, _joined(settings, by))


def max_autotune_fp8(s: Subject) -> Sampler:
    """max-autotune with the predictor's products in fp8, row by row: what ours-fp8 is to be
    compared with.
    """
    _need_fp8(s)
    return max_autotune(s, fp8=True)


class _Cloned(nn.Module):
    """A compiled network whose result outlives its next call: its CUDA graph writes to the same
    place again.
    """

    def __init__(self, network: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.network(*args).clone()


def plan_graph(s: Subject, hoisted: bool = False, fp8: bool = False) -> Sampler:
    """The strongest: tuned and compiled without graphs, and then this library's own capture of the
    whole plan around it.
    """
    if s.device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    torch._dynamo.reset()
    tuned, settings = inductor.best(graphs=False)

    def wrap(network: nn.Module) -> Any:
        return HoistedSiT(network, tuned) if hoisted else tuned(network)

    model, by = _plain(s, wrap, _decoder_of(s, tuned), fp8=fp8)
    return captured(s, model, _joined(settings, by), AnyJob)


def plan_graph_hoisted(s: Subject) -> Sampler:
    """plan-graph with two of this library's ideas in torch's words: adaLN's modulations hoisted,
    GELU in the product before it.
    """
    return plan_graph(s, hoisted=True)


def plan_graph_fp8(s: Subject) -> Sampler:
    """plan-graph-hoisted with the predictor's products in fp8, row by row."""
    _need_fp8(s)
    return plan_graph(s, hoisted=True, fp8=True)


def _joined(*settings: str) -> str:
    return ", ".join(filter(None, settings))


def diffusers(s: Subject) -> Sampler:
    """diffusers' transformer of the same size, compiled with defaults; its weights are its own."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise Unavailable(f"diffusers is not installed ({error})") from None
    tuned = functools.partial(torch.compile, dynamic=False)

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
        return tuned(_DiT(network.to(s.dtype).requires_grad_(False).eval(), config.channels))

    torch._dynamo.reset()
    model, _ = _plain(s, _as_it_is, _decoder_of(s, tuned))
    model = replace(
        model, predictor=transformer(s.predictor.config), refiner=transformer(s.refiner.config)
    )
    return plainly(s, model)


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
    "max-autotune-fp8": max_autotune_fp8,
    "plan-graph": plan_graph,
    "plan-graph-hoisted": plan_graph_hoisted,
    "plan-graph-fp8": plan_graph_fp8,
    "diffusers": diffusers,
}
OWN_WEIGHTS = ("diffusers",)
"""Those whose networks are others: their latents can't be compared."""
