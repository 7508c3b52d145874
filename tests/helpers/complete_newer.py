"""Whole pipelines of Qwen-Image, Z-Image, FLUX.2 Klein and Wan, with tiny random text encoders of
their real classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from complete import _random, _t5
from newer_pipelines import WIDTH, newer, transformer

KINDS = ("qwen", "zimage", "klein", "wan", "wan22")


def _tokenizer() -> Any:
    """Letters are its words, and a chat is what was said in it."""
    tokenizer, _ = _t5(0)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def _qwen3(name: str, layers: int, hidden: int) -> Any:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=128, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=hidden // 2,
    )  # fmt: skip
    return _random(getattr(transformers, name), config, 4)


def _qwen_vl() -> Any:
    import transformers

    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=128, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=1,
            rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        ),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH
        ),
    )  # fmt: skip
    return _random(transformers.Qwen2_5_VLForConditionalGeneration, config, 5)


def _umt5() -> Any:
    import transformers

    config = transformers.UMT5Config(
        vocab_size=128, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return _random(transformers.UMT5EncoderModel, config, 6)


def complete(kind: str) -> Any:
    """A pipeline with its text encoder."""
    network = transformer(kind)
    if kind == "qwen":
        encoder = _qwen_vl()
    elif kind == "zimage":
        encoder = _qwen3("Qwen3Model", 2, WIDTH)
    elif kind == "klein":  # which reads its 9th, 18th and 27th layer
        encoder = _qwen3("Qwen3ForCausalLM", 27, 8)
        network = transformer(kind, joint_attention_dim=24)
    else:
        encoder = _umt5()
    pipe = newer(kind, network)
    pipe.register_modules(text_encoder=encoder, tokenizer=_tokenizer())
    return pipe


def saved(kind: str, folder: Path) -> Path:
    """The folder of such a pipeline."""
    with torch.random.fork_rng():
        complete(kind).save_pretrained(folder / kind)
    return folder / kind
