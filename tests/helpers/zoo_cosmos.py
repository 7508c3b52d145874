"""Cosmos-Predict2 (in noise levels up to 80), Predict2.5 and Transfer2.5 (UniPC), and Cosmos3."""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch
from pipelines import diffusers
from video_parts import LATENTS, SIZE, flow_euler, flow_unipc, prompts, with_wan_vae
from zoo import Case, normal, picture, random_

_WIDTH = 32
"""Of a prompt's tokens."""


class _Permissive:
    """In the place of the checker, a network of its own, that the licence asks for."""

    def to(self, device: Any) -> _Permissive:
        return self


def _without_torchvision() -> None:
    """The networks resize a mask by torchvision, the nearest pixel's way."""

    def resize(mask: torch.Tensor, size: list[int], interpolation: Any) -> torch.Tensor:
        return torch.nn.functional.interpolate(mask, size, mode="nearest")

    stand_in = types.SimpleNamespace(
        functional=types.SimpleNamespace(resize=resize),
        InterpolationMode=types.SimpleNamespace(NEAREST=None),
    )
    for name in ("transformers.transformer_cosmos", "controlnets.controlnet_cosmos"):
        module: Any = importlib.import_module(f"diffusers.models.{name}")
        if not hasattr(module, "transforms"):
            module.transforms = stand_in


_SIZES: dict[str, Any] = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    mlp_ratio=2,
    text_embed_dim=_WIDTH,
    adaln_lora_dim=4,
    max_size=(4, 32, 32),
    extra_pos_embed_type="learnable",
)


def _network(**config: Any) -> Any:
    _without_torchvision()
    sizes = _SIZES | dict(in_channels=17, out_channels=16, num_layers=1)
    return random_(diffusers.CosmosTransformer3DModel(**sizes | config), 12)


def _case(name: str, scheduler: Any, given: dict[str, Any], **parts: Any) -> Case:
    parts = {"transformer": _network(), "safety_checker": _Permissive()} | parts
    return Case(with_wan_vae(name, scheduler, **parts), LATENTS | prompts(_WIDTH) | given)


def text_to_image() -> Case:
    """x = data + sigma * noise, so that the network's prediction is made a velocity in sigma."""
    return _case(
        "Cosmos2TextToImagePipeline",
        flow_euler(use_karras_sigmas=True),
        {},
        transformer=_network(in_channels=16),
    )


def video_to_world() -> Case:
    scheduler = flow_euler(use_karras_sigmas=True)
    given = {"image": picture(SIZE), "num_frames": 9}
    return _case("Cosmos2VideoToWorldPipeline", scheduler, given)


def _unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_karras_sigmas=True,
        sigma_max=200.0,
        sigma_min=0.01,
    )


def predict() -> Case:
    """The network is told noise levels, not times; those of the first frames are small."""
    video = torch.stack([normal(3, SIZE, SIZE, seed=i).sigmoid() for i in range(9)])
    given = {"video": video[None], "num_frames": 9}
    return _case("Cosmos2_5_PredictBasePipeline", _unipc(), given)


def transfer() -> Case:
    """Two chunks of frames, one after the other."""
    context: dict[str, Any] = dict(img_context_dim_in=32, img_context_dim_out=32)
    controlnet = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=1,
        in_channels=16 + 1 + 1,
        latent_channels=16 + 1 + 1,
        model_channels=32,
        **_SIZES | context,
    )
    return _case(
        "Cosmos2_5_TransferPipeline",
        _unipc(),
        {
            "controls": [normal(3, SIZE, SIZE, seed=i).clamp(-1, 1) for i in range(9)],
            "num_frames": 9,
            "num_frames_per_chunk": 5,
        },
        transformer=_network(controlnet_block_every_n=1, img_context_num_tokens=4, **context),
        controlnet=random_(controlnet, 13),
    )


def _chat_tokenizer() -> Any:
    """Of letters, with a template for conversations."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<|im_end|>", "<|vision_start|>", *(chr(code) for code in range(32, 127))]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|vision_start|>"],
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def omni(native: bool = False) -> Case:
    """Cosmos3 with the scheduler that its documentation sets; text to video."""
    tokenizer = _chat_tokenizer()
    network = diffusers.Cosmos3OmniTransformer(
        head_dim=12,
        hidden_size=24,
        intermediate_size=24,
        latent_channel=16,
        latent_patch_size=1,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=1,
        patch_latent_dim=16,
        rope_axes_dim=[2, 2, 2],
        vocab_size=len(tokenizer),
    )
    pipe = with_wan_vae(
        "Cosmos3OmniPipeline",
        flow_unipc(10.0),
        transformer=random_(network, 12),
        text_tokenizer=tokenizer,
        enable_safety_checker=False,
        use_native_flow_schedule=native,
    )
    return Case(pipe, LATENTS | {"prompt": "a cat", "negative_prompt": "b", "num_frames": 5})


def omni_native() -> Case:
    """With sigmas of its own, which the scheduler shifts; and the number of steps beside them."""
    return omni(native=True)


CASES = {
    "Cosmos2TextToImagePipeline": text_to_image,
    "Cosmos2VideoToWorldPipeline": video_to_world,
    "Cosmos2_5_PredictBasePipeline": predict,
    "Cosmos2_5_TransferPipeline": transfer,
    "Cosmos3OmniPipeline": omni,
    "Cosmos3OmniPipeline: native schedule": omni_native,
}
