"""HunyuanVideo, SkyReels-V1, FramePack, HunyuanVideo 1.5; and Mochi."""

from __future__ import annotations

from typing import Any

from pipelines import diffusers
from video_parts import LATENTS, SIZE, Resized, flow_euler, prompts, vision
from zoo import Case, assembled, normal, picture, random_

_WIDTH, _POOLED, _IMAGE = 16, 8, 12
"""Of a prompt's tokens, of its one vector, and of an image's tokens."""


def _vae() -> Any:
    """8 times smaller in space, 4 times in time, 4 channels."""
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return random_(vae, 11)


_SIZES: dict[str, Any] = dict(
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=10,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    patch_size=1,
    text_embed_dim=_WIDTH,
    pooled_projection_dim=_POOLED,
    rope_axes_dim=(2, 4, 4),
)


def _hunyuan(name: str, scheduler: Any, given: dict[str, Any], network: Any, **parts: Any) -> Case:
    words = prompts(_WIDTH, mask="prompt_attention_mask")
    words["pooled_prompt_embeds"] = normal(1, _POOLED, seed=22)
    words["negative_pooled_prompt_embeds"] = normal(1, _POOLED, seed=23)
    pipe = assembled(
        name, vae=_vae(), transformer=random_(network, 12), scheduler=scheduler, **parts
    )
    return Case(pipe, LATENTS | words | {"num_frames": 5} | given)


def _network(channels: int, **config: Any) -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(in_channels=channels, **_SIZES | config)


def text() -> Case:
    """Guidance is told to the network."""
    return _hunyuan("HunyuanVideoPipeline", flow_euler(7.0), {}, _network(4))


def image() -> Case:
    """The first frame is the image, and isn't given to the scheduler."""
    network = _network(4, image_condition_type="token_replace")
    given = {"image": picture(SIZE), "guidance_scale": 6.0}
    return _hunyuan("HunyuanVideoImageToVideoPipeline", flow_euler(7.0), given, network)


def image_beside() -> Case:
    """The image beside the latents, in channels of its own."""
    network = _network(9, image_condition_type="latent_concat", guidance_embeds=False)
    given = {"image": picture(SIZE)}
    return _hunyuan("HunyuanVideoImageToVideoPipeline", flow_euler(7.0), given, network)


def skyreels() -> Case:
    network = _network(8, guidance_embeds=False)
    return _hunyuan(
        "HunyuanSkyreelsImageToVideoPipeline", flow_euler(7.0), {"image": picture(SIZE)}, network
    )


def framepack() -> Case:
    """Two sections, the last one first."""
    network = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        has_image_proj=True,
        image_proj_dim=_IMAGE,
        has_clean_x_embedder=True,
        **_SIZES | {"patch_size": 2},
    )
    return _hunyuan(
        "HunyuanVideoFramepackPipeline",
        flow_euler(use_dynamic_shifting=True),
        {"image": picture(SIZE), "num_frames": 18, "latent_window_size": 3},
        network,
        image_encoder=vision("Siglip", _IMAGE),
        feature_extractor=Resized(),
    )


def _fifteen(
    name: str, given: dict[str, Any], task: str, meanflow: bool = False, **parts: Any
) -> Case:
    """HunyuanVideo 1.5 in 480p: two encoded prompts, and a guider."""
    from diffusers.guiders import ClassifierFreeGuidance

    network = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=_WIDTH,
        text_embed_2_dim=_WIDTH,
        image_embed_dim=_IMAGE,
        rope_axes_dim=(2, 2, 4),
        target_size=SIZE,
        task_type=task,
        use_meanflow=meanflow,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    pipe = assembled(
        name,
        vae=random_(vae, 11),
        transformer=random_(network, 12),
        scheduler=flow_euler(5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        **parts,
    )
    words: dict[str, Any] = {}
    for suffix in ("", "_2"):
        for key, value in prompts(_WIDTH, 6 + len(suffix), mask="prompt_embeds_mask").items():
            words[key + suffix] = value
    return Case(pipe, words | {"num_frames": 5, "output_type": "latent"} | given)


def fifteen_text() -> Case:
    given = {"height": SIZE, "width": SIZE}
    return _fifteen("HunyuanVideo15Pipeline", given, "t2v")


def fifteen_image(meanflow: bool = False) -> Case:
    return _fifteen(
        "HunyuanVideo15ImageToVideoPipeline",
        {"image": picture(SIZE)},
        "i2v",
        meanflow,
        image_encoder=vision("Siglip", _IMAGE),
        feature_extractor=Resized(),
    )


def fifteen_distilled() -> Case:
    """The network is told the time of the next call, too."""
    return fifteen_image(meanflow=True)


def mochi() -> Case:
    """Noise levels count up, and the network predicts the data minus the noise."""
    network = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    pipe = assembled(
        "MochiPipeline",
        vae=random_(vae, 11),
        transformer=random_(network, 12),
        scheduler=flow_euler(invert_sigmas=True),
    )
    words = prompts(32, mask="prompt_attention_mask")
    words = {k: v.bool() if k.endswith("mask") else v for k, v in words.items()}
    return Case(pipe, LATENTS | words | {"num_frames": 7})


CASES = {
    "HunyuanVideoPipeline": text,
    "HunyuanVideoImageToVideoPipeline": image,
    "HunyuanVideoImageToVideoPipeline: image beside the latents": image_beside,
    "HunyuanSkyreelsImageToVideoPipeline": skyreels,
    "HunyuanVideoFramepackPipeline": framepack,
    "HunyuanVideo15Pipeline": fifteen_text,
    "HunyuanVideo15ImageToVideoPipeline": fifteen_image,
    "HunyuanVideo15ImageToVideoPipeline: distilled": fifteen_distilled,
    "MochiPipeline": mochi,
}
