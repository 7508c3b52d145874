"""A stand-in for the part of ComfyUI that calls samplers, since ComfyUI is no package.

It follows comfy/samplers.py and comfy/model_sampling.py of 2026: what a SAMPLER is called with, how
noise and latent image are mixed, what the model that it gets returns, with guidance and with a mask
for inpainting, and what becomes of its callbacks. It leaves out devices, hooks, areas of
conditions and the nodes' execution. Names are ComfyUI's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma, a number or (N,), to be multiplied with x (N, ...)."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.numel() > 1 else sigma.reshape(())


class CONST:
    """Flow models: x is mixed of noise and data, and the network returns noise - data."""

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - _like(sigma, x) * output

    def noise_scaling(
        self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False
    ) -> Tensor:
        s = _like(sigma, noise)
        return s * noise + (1 - s) * latent_image

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent / (1 - _like(sigma, latent))


class EPS:
    """Models such as Stable Diffusion 1.5: noise is added to data, without end."""

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - _like(sigma, x) * output

    def noise_scaling(
        self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False
    ) -> Tensor:
        return latent_image + _like(sigma, noise) * noise

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent


class ModelSamplingDiscreteFlow:
    """The noise levels of SD3, Wan and others: a shift as a factor."""

    entries = 1000

    def __init__(self, shift: float) -> None:
        self.shift = shift
        self.sigmas = torch.tensor(
            [self._level((i + 1) / self.entries) for i in range(self.entries)]
        )

    def _level(self, share: float) -> float:
        return self.shift * share / (1 + (self.shift - 1) * share)

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0:
            return 1.0
        return 0.0 if percent >= 1 else self._level(1 - percent)


class ModelSamplingFlux(ModelSamplingDiscreteFlow):
    """The noise levels of FLUX: a shift as a logarithm."""

    entries = 10_000

    def _level(self, share: float) -> float:
        return math.exp(self.shift) / (math.exp(self.shift) + 1 / share - 1)


def simple_scheduler(model_sampling: Any, steps: int) -> Tensor:
    """SIGMAS: every so many of the model's levels, and 0."""
    stride = len(model_sampling.sigmas) / steps
    picked = [model_sampling.sigmas[-1 - int(i * stride)] for i in range(steps)]
    return torch.tensor([*map(float, picked), 0.0])


class Model:
    """BaseModel. network(x, sigma, condition) -> noise - data."""

    def __init__(self, model_sampling: Any, network: Callable[..., Tensor]) -> None:
        self.model_sampling, self.network = model_sampling, network

    def apply_model(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        output = self.network(x, sigma, condition)
        return self.model_sampling.calculate_denoised(sigma, output, x)

    def scale_latent_inpaint(
        self, sigma: Tensor, noise: Tensor, latent_image: Tensor, **_: Any
    ) -> Tensor:
        return self.model_sampling.noise_scaling(sigma, noise, latent_image)


class ModelPatcher:
    """MODEL."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)


class CFGGuider:
    """GUIDER: called as a model, it returns the guided denoised image."""

    def __init__(
        self, model_patcher: ModelPatcher, positive: Any, negative: Any = None, cfg: float = 1.0
    ) -> None:
        self.model_patcher, self.conds, self.cfg = model_patcher, (positive, negative), cfg

    def __call__(
        self, x: Tensor, sigma: Tensor, model_options: Any = None, seed: int | None = None
    ) -> Tensor:
        positive, negative = self.conds
        conditional = self.inner_model.apply_model(x, sigma, positive)
        if math.isclose(self.cfg, 1.0):
            return conditional
        unconditional = self.inner_model.apply_model(x, sigma, negative)
        return unconditional + self.cfg * (conditional - unconditional)

    @torch.inference_mode()
    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., object] | None = None,
        disable_pbar: bool = True,
        seed: int | None = None,
    ) -> Tensor:
        if not len(sigmas):
            return latent_image
        self.inner_model = self.model_patcher.model
        try:
            extra_args = {"model_options": {}, "seed": seed}
            return sampler.sample(
                self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
            )
        finally:
            del self.inner_model


class KSamplerX0Inpaint:
    """The model that a sampler gets: the guider, with a mask for inpainting around it."""

    latent_image: Tensor
    noise: Tensor

    def __init__(self, model: CFGGuider, sigmas: Tensor) -> None:
        self.inner_model, self.sigmas = model, sigmas

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        denoise_mask: Tensor | None,
        model_options: Any = None,
        seed: int | None = None,
    ) -> Tensor:
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options=model_options, seed=seed)
        kept = 1 - denoise_mask
        outside = self.inner_model.inner_model.scale_latent_inpaint(
            x=x, sigma=sigma, noise=self.noise, latent_image=self.latent_image
        )
        mixed = x * denoise_mask + outside * kept
        out = self.inner_model(mixed, sigma, model_options=model_options, seed=seed)
        return out * denoise_mask + self.latent_image * kept


class KSAMPLER:
    """SAMPLER: a function in k-diffusion's convention."""

    def __init__(
        self, sampler_function: Callable[..., Tensor], extra_options: dict[str, Any] | None = None
    ) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(
        self,
        model_wrap: CFGGuider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., object] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        extra_args["denoise_mask"] = denoise_mask
        model_k = KSamplerX0Inpaint(model_wrap, sigmas)
        model_k.latent_image, model_k.noise = latent_image, noise
        levels = model_wrap.inner_model.model_sampling
        full = float(sigmas[0]) >= float(levels.sigma_max) * (1 - 1e-5)
        x = levels.noise_scaling(sigmas[0], noise, latent_image, full)

        def k_callback(seen: dict[str, Any]) -> None:
            if callback is not None:
                callback(seen["i"], seen["denoised"], seen["x"], len(sigmas) - 1)

        samples = self.sampler_function(
            model_k,
            x,
            sigmas,
            extra_args=extra_args,
            callback=k_callback,
            disable=disable_pbar,
            **self.extra_options,
        )
        return levels.inverse_noise_scaling(sigmas[-1], samples)


def sample_euler(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[..., object] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Euler's method, which ComfyUI names "euler"."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].repeat(len(x)), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def modules(models_dir: Path) -> dict[str, ModuleType]:
    """What the nodes import, by name. models_dir: ComfyUI's folder of models."""
    names = ("comfy", "comfy.model_sampling", "comfy.samplers", "folder_paths")
    comfy, model_sampling, samplers, folder_paths = made = [ModuleType(name) for name in names]
    vars(model_sampling).update(CONST=CONST, EPS=EPS)
    vars(samplers).update(KSAMPLER=KSAMPLER, CFGGuider=CFGGuider)
    vars(comfy).update(model_sampling=model_sampling, samplers=samplers)
    folders: dict[str, Path] = {}

    def get_filename_list(name: str) -> list[str]:
        paths = sorted(path for path in folders[name].rglob("*") if path.is_file())
        return [str(path.relative_to(folders[name])) for path in paths]

    def get_full_path(name: str, file: str) -> str | None:
        return str(folders[name] / file) if file in get_filename_list(name) else None

    vars(folder_paths).update(
        models_dir=str(models_dir),
        add_model_folder_path=lambda name, path: folders.update({name: Path(path)}),
        get_filename_list=get_filename_list,
        get_full_path=get_full_path,
    )
    return dict(zip(names, made, strict=True))
