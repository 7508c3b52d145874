"""Modular pipelines, with the components and arguments of the ordinary ones.

Left out: Ideogram 4, whose guidance has a value for each step, so that it can't be called for
several plans alike; Echo, which has no scheduler; MiniMax-H3 and Wan-Animate 2, whose inputs no
ordinary pipeline has.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import zoo
from torch.nn.functional import interpolate
from zoo import Case, normal, picture, random_

_ENDS = (
    "text_encoder", "decode", "prompt_enhancer", "prompt_upsampler", "prompt_upsample", "duration",
    "image_encoder", "after_decode",
)  # fmt: skip
"""Blocks that are left out: prompts are given encoded, and latents are what is returned."""


def modular(
    name: str,
    blocks: str,
    components: dict[str, Any],
    arguments: dict[str, Any],
    without: tuple[str, ...] = (),
    output: str = "latents",
    note: str = "",
) -> Case:
    """A modular pipeline of this class: the blocks between the encoded text and the latents.

    arguments: those that no block takes are left out. without: more blocks to leave out.
    output: the name of the blocks' result that is to be returned.
    """
    chosen = getattr(diffusers, blocks)()
    for end in (*_ENDS, *without):
        chosen.sub_blocks.pop(end, None)
    pipe = getattr(diffusers, name)(blocks=chosen)
    expected = {spec.name for spec in chosen.expected_components}
    pipe.update_components(**{n: c for n, c in components.items() if n in expected})
    for block in _all_blocks(pipe._blocks):
        if hasattr(block, "set_progress_bar_config"):  # the pipeline's own reaches the first level
            block.set_progress_bar_config(disable=True)
    taken = {parameter.name for parameter in chosen.inputs}
    given = {n: a for n, a in arguments.items() if n in taken}
    return Case(pipe, given | dict(output=output), note=note)


def _all_blocks(block: Any) -> list[Any]:
    inner = getattr(block, "sub_blocks", None) or {}
    return [block, *(b for sub in inner.values() for b in _all_blocks(sub))]


def _like(
    source: str,
    name: str,
    blocks: str,
    without: tuple[str, ...] = (),
    note: str = "",
    **arguments: Any,
) -> Callable[[], Case]:
    """A modular pipeline with what an ordinary one of the zoo has and is called with."""

    def build() -> Case:
        ordinary = zoo.builders()[source]()
        given = ordinary.arguments | arguments
        return modular(name, blocks, ordinary.pipe.components, given, without, note=note)

    return build


def _anima() -> Case:
    from diffusers.models.transformers import transformer_cosmos

    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32),
        rope_scale=(1.0, 4.0, 4.0), concat_padding_mask=True, extra_pos_embed_type=None,
    )  # fmt: skip
    if not hasattr(transformer_cosmos, "transforms"):  # without torchvision
        transformer_cosmos.transforms = _TRANSFORMS
    conditioner = diffusers.AnimaTextConditioner(
        source_dim=16, target_dim=16, model_dim=16, num_layers=1, num_attention_heads=2,
        target_vocab_size=32, min_sequence_length=8,
    )  # fmt: skip
    components = dict(
        transformer=random_(transformer, 1),
        text_conditioner=random_(conditioner, 2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=zoo.builders()["QwenImagePipeline"]().pipe.vae,
    )
    mask = torch.ones(1, 5, dtype=torch.long)
    arguments = dict(
        qwen_prompt_embeds=normal(1, 5, 16),
        qwen_attention_mask=mask,
        t5_input_ids=torch.arange(5)[None],
        t5_attention_mask=mask,
        negative_qwen_prompt_embeds=normal(1, 5, 16, seed=1),
        negative_qwen_attention_mask=mask,
        negative_t5_input_ids=torch.arange(5, 10)[None],
        negative_t5_attention_mask=mask,
        height=32,
        width=32,
        image=picture(32),
        strength=0.9,
    )
    return modular("AnimaModularPipeline", "AnimaAutoBlocks", components, arguments)


_TRANSFORMS = SimpleNamespace(
    functional=SimpleNamespace(resize=lambda x, size, **unused: interpolate(x, size)),
    InterpolationMode=SimpleNamespace(NEAREST=None),
)
"""What Cosmos' transformer takes of torchvision."""


def _flux_3(name: str, blocks: str, flow_map: bool) -> Case:
    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4), flow_map=flow_map,
    )  # fmt: skip
    components = dict(
        transformer=random_(transformer, 1), vae=zoo.builders()["Flux2Pipeline"]().pipe.vae
    )
    arguments = dict(
        prompt_embeds=normal(1, 5, 16),
        negative_prompt_embeds=normal(1, 5, 16, seed=1),
        height=64,
        width=64,
    )
    return modular(name, blocks, components, arguments)


def _minimax_music_3() -> Case:
    transformer = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=8, condition_dim=16, num_layers=1, num_attention_heads=2,
        attention_head_dim=16, ff_inner_dim=32, rotary_dim=8, fourier_embedding_dim=16,
    )  # fmt: skip
    encoder = diffusers.MiniMaxMusic3ConditionEncoder(
        condition_hidden_dim=4, num_condition_layers=2, out_dim=16
    )
    components = dict(
        transformer=random_(transformer, 1),
        condition_encoder=random_(encoder, 2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1, invert_sigmas=True
        ),
    )
    # Two overlapping pieces of 200 frames.
    return modular(
        "MiniMaxMusic3ModularPipeline",
        "MiniMaxMusic3Blocks",
        components,
        dict(frame_hiddens=normal(1, 250, 8)),
        without=("semantic_generator",),
        output="latent_chunks",
        note="inverted sigmas, a run for each piece",
    )


def _ltx_2() -> Case:
    ordinary = zoo.builders()["LTX2Pipeline"]()
    width = ordinary.pipe.transformer.config.caption_channels
    arguments = ordinary.arguments | dict(batch_size=1, dtype=torch.float32)
    for seed, sign in enumerate(("", "negative_")):
        arguments |= {
            f"{sign}connector_prompt_embeds": normal(1, 6, width, seed=seed),
            f"{sign}connector_audio_prompt_embeds": normal(1, 6, width, seed=2 + seed),
            f"{sign}connector_attention_mask": torch.ones(1, 6, dtype=torch.long),
        }
    guider = diffusers.LTX2Guidance(guidance_scale=3.0, spatio_temporal_guidance_blocks=[0])
    components = ordinary.pipe.components | dict(guider=guider)
    return modular("LTX2ModularPipeline", "LTX2AutoBlocks", components, arguments)


def _wan_vace() -> Case:
    build = zoo.builders()["WanVACEPipeline"]
    ordinary, second = build(), build().pipe.transformer
    components = ordinary.pipe.components | dict(transformer_2=second)
    return modular("Wan22VaceModularPipeline", "Wan22VaceBlocks", components, ordinary.arguments)


_OF_TEXT = ("vae_encoder",)
"""Left out where a picture would be resized to a million pixels; its latents are given."""

_NO_PICTURE = torch.zeros(1, 5, dtype=torch.bool)

CASES = {
    "FluxModularPipeline": _like("FluxPipeline", "FluxModularPipeline", "FluxAutoBlocks"),
    "FluxKontextModularPipeline": _like(
        "FluxKontextPipeline", "FluxKontextModularPipeline", "FluxKontextAutoBlocks"
    ),
    "Flux2ModularPipeline": _like("Flux2Pipeline", "Flux2ModularPipeline", "Flux2AutoBlocks"),
    "Flux2KleinModularPipeline": _like(
        "Flux2KleinPipeline", "Flux2KleinModularPipeline", "Flux2KleinAutoBlocks"
    ),
    "Flux3ModularPipeline": lambda: _flux_3("Flux3ModularPipeline", "Flux3AutoBlocks", False),
    "Flux3DistilledModularPipeline": lambda: _flux_3(
        "Flux3DistilledModularPipeline", "Flux3DistilledAutoBlocks", True
    ),
    "StableDiffusion3ModularPipeline": _like(
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3ModularPipeline",
        "StableDiffusion3AutoBlocks",
    ),
    "QwenImageModularPipeline": _like(
        "QwenImageInpaintPipeline", "QwenImageModularPipeline", "QwenImageAutoBlocks"
    ),
    "QwenImageEditModularPipeline": _like(
        "QwenImageEditPipeline",
        "QwenImageEditModularPipeline",
        "QwenImageEditAutoBlocks",
        _OF_TEXT,
        image_latents=normal(1, 4, 1, 8, 8),
    ),
    "QwenImageEditPlusModularPipeline": _like(
        "QwenImageEditPlusPipeline",
        "QwenImageEditPlusModularPipeline",
        "QwenImageEditPlusAutoBlocks",
        _OF_TEXT,
        image_latents=[normal(1, 4, 1, 8, 8), normal(1, 4, 1, 4, 4, seed=1)],
    ),
    "QwenImage21ModularPipeline": _like(
        "QwenImage21Pipeline",
        "QwenImage21ModularPipeline",
        "QwenImage21AutoBlocks",
        image_pad_mask=_NO_PICTURE,
        negative_image_pad_mask=_NO_PICTURE,
    ),
    "ZImageModularPipeline": _like(
        "ZImageImg2ImgPipeline", "ZImageModularPipeline", "ZImageAutoBlocks"
    ),
    "WanModularPipeline": _like("WanPipeline", "WanModularPipeline", "WanBlocks"),
    "Wan22ModularPipeline": _like("WanPipeline", "Wan22ModularPipeline", "Wan22Blocks"),
    "Wan22Image2VideoModularPipeline": _like(
        "WanImageToVideoPipeline", "Wan22Image2VideoModularPipeline", "Wan22Image2VideoBlocks"
    ),
    "ErnieImageModularPipeline": _like(
        "ErnieImagePipeline",
        "ErnieImageModularPipeline",
        "ErnieImageAutoBlocks",
        height=64,
        width=64,
    ),
    "HunyuanVideo15ModularPipeline": _like(
        "HunyuanVideo15Pipeline",
        "HunyuanVideo15ModularPipeline",
        "HunyuanVideo15AutoBlocks",
        batch_size=1,
    ),
    "Krea2ModularPipeline": _like("Krea2Pipeline", "Krea2ModularPipeline", "Krea2AutoBlocks"),
    "LTXModularPipeline": _like("LTXPipeline", "LTXModularPipeline", "LTXAutoBlocks"),
    "QwenImageLayeredModularPipeline": _like(
        "QwenImageLayeredPipeline",
        "QwenImageLayeredModularPipeline",
        "QwenImageLayeredAutoBlocks",
        _OF_TEXT,
        image_latents=normal(1, 1, 8, 4, 4),
    ),
    "QwenImage21TurboModularPipeline": _like(
        "QwenImage21Pipeline",
        "QwenImage21TurboModularPipeline",
        "QwenImage21TurboAutoBlocks",
        image_pad_mask=_NO_PICTURE,
    ),
    "HeliosModularPipeline": _like(
        "HeliosPipeline", "HeliosModularPipeline", "HeliosAutoBlocks", history_sizes=[4, 2, 1]
    ),
    "Cosmos3OmniModularPipeline": _like(
        "Cosmos3OmniPipeline",
        "Cosmos3OmniModularPipeline",
        "Cosmos3OmniBlocks",
        cond_input_ids=[1, 2, 3],
        uncond_input_ids=[1, 2],
    ),
    "Wan22VaceModularPipeline": _wan_vace,
    "LTX2ModularPipeline": _ltx_2,
    "HeliosPyramidModularPipeline": _like(
        "HeliosPyramidPipeline",
        "HeliosPyramidModularPipeline",
        "HeliosPyramidAutoBlocks",
        history_sizes=[4, 2, 1],
    ),
    "AnimaModularPipeline": _anima,
    "MiniMaxMusic3ModularPipeline": _minimax_music_3,
}
