"""Refiners of text-to-image models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import (
    diffusers,
    flux_transformer,
    sd3,
    sd3_transformer,
    unet,
)
from prompt_models import KINDS, NETWORKS, conditioning
from torch import nn

import flowturbo as ft
from flowturbo.models.text_to_image import PromptNetwork, check_refiner
from flowturbo.storage.files import CheckpointError

SD15 = dict(
    sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    cross_attention_dim=768, attention_head_dim=8,
)  # fmt: skip


def test_the_refiner_of_2_rf_has_the_papers_size():
    with torch.device("meta"):
        teacher = diffusers.UNet2DConditionModel(**SD15)
        refiner: Any = ft.refiner_for(teacher)
    assert sum(p.numel() for p in teacher.parameters()) == 859_520_964
    assert sum(p.numel() for p in refiner.parameters()) == 43_500_164
    assert (
        refiner.config.in_channels,
        refiner.config.out_channels,
        refiner.config.layers_per_block,
    ) == (
        8,
        4,
        1,
    )
    assert tuple(refiner.config.block_out_channels) == (160, 160, 320, 320)


@pytest.mark.parametrize("depth", [1, 2])
def test_refiners_of_published_transformers(depth):
    """Sizes of SD3-medium, SD3.5-medium, with its dual attention, and FLUX.1-dev."""
    with torch.device("meta"):
        sd = dict(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            in_channels=16,
            out_channels=16,
        )
        for teacher in (
            diffusers.SD3Transformer2DModel(**sd),
            diffusers.SD3Transformer2DModel(
                **sd, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
            ),
            diffusers.FluxTransformer2DModel(guidance_embeds=True),
        ):
            refiner: Any = ft.refiner_for(teacher, depth)
            assert refiner.config.in_channels == 2 * teacher.config.in_channels
            assert refiner.config.num_layers == depth
            assert refiner.proj_out.weight.shape == teacher.proj_out.weight.shape
            share = sum(p.numel() for p in refiner.parameters()) / sum(
                p.numel() for p in teacher.parameters()
            )
            assert share < 0.07 * depth


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2])
def test_a_new_refiner_passes_the_velocity_on_and_lives_in_a_folder(kind, depth, tmp_path):
    teacher = NETWORKS[kind]()
    refiner: Any = ft.refiner_for(teacher, depth)
    x, v, c = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), conditioning(kind)
    more = {"embedded_guidance": torch.ones(2)} if kind == "flux" else {}
    with torch.no_grad():
        assert PromptNetwork(refiner)(x, torch.tensor([0.2, 0.9]), {**c, **more}, v).eq(0).all()
    refiner.save_pretrained(tmp_path)
    assert check_refiner(tmp_path, teacher).config.in_channels == 2 * teacher.config.in_channels
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"refiner .* can't be read"):
        check_refiner(tmp_path, teacher)


def test_refiners_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="depth must be 1 or 2, got 3"):
        ft.refiner_for(unet(), 3)
    with pytest.raises(TypeError, match="teacher must be one of UNet2DConditionModel, SD3"):
        ft.refiner_for(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must read 8 channels, x and v, got 4"):
        ft.from_pipeline(sd3(), sd3_transformer())
    with pytest.raises(
        TypeError, match="must be a SD3Transformer2DModel as the predictor is, got Flux"
    ):
        ft.from_pipeline(sd3(), ft.refiner_for(flux_transformer()))
