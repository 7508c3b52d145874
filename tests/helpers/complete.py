"""Whole pipelines of diffusers' real classes, text encoders and tokenizers among them, tiny and
random, built from nothing.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pipelines
import torch

_LENGTH = 16
"""Tokens of a prompt."""


def _clip_tokenizer() -> Any:
    """Letters are its words."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(
            json.dumps({word: number for number, word in enumerate(words)}), encoding="utf-8"
        )
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=_LENGTH)


def _clip(hidden: int, seed: int, projected: bool, tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=_LENGTH,
        projection_dim=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _random(CLIPTextModelWithProjection if projected else CLIPTextModel, config, seed)


def _t5(seed: int) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(code) for code in range(33, 127))]
    plain = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=_LENGTH,
    )
    config = T5Config(
        vocab_size=len(pieces),
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, _random(T5EncoderModel, config, seed)


def _random(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval().requires_grad_(False)


def complete_2rf() -> Any:
    """A Stable Diffusion pipeline with a UNet that stands for 2-RF's."""
    diffusers, tokenizer = pipelines.diffusers, _clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=pipelines.vae(),
        text_encoder=_clip(32, 4, False, tokenizer),
        tokenizer=tokenizer,
        unet=pipelines.unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def complete_sd3() -> Any:
    """Stable Diffusion 3, without its third text encoder, as many run it."""
    diffusers, tokenizer = pipelines.diffusers, _clip_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=pipelines.sd3_transformer(),
        vae=pipelines.vae(),
        text_encoder=_clip(16, 5, True, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_clip(16, 6, True, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def complete_flux() -> Any:
    diffusers, tokenizer = pipelines.diffusers, _clip_tokenizer()
    other_tokenizer, other = _t5(8)
    return diffusers.FluxPipeline(
        transformer=pipelines.flux_transformer(),
        vae=pipelines.vae(),
        text_encoder=_clip(16, 7, False, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=other,
        tokenizer_2=other_tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
