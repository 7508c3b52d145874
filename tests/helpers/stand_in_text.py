"""Stand-ins for tokenizers, processors and text encoders.

What the zoo tests of a pipeline is its sampling. Of the text it needs no more than hidden states
that depend on it, in the shapes the pipeline expects.
"""

from __future__ import annotations

from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
BatchEncoding = transformers.BatchEncoding
BaseModelOutputWithPooling = transformers.modeling_outputs.BaseModelOutputWithPooling

_PAD, _END, _IMAGE, _FIRST = 0, 1, 2, 3
_WORDS = 128


class Letters:
    """A tokenizer and a processor of text and images: a letter is a token."""

    model_max_length = 64
    pad_token_id, eos_token_id, bos_token_id, image_token_id = _PAD, _END, _END, _IMAGE
    padding_side = "right"
    added_tokens_encoder = MappingProxyType[str, int]({})

    def __init__(self) -> None:
        self.tokenizer, self.image_processor = self, _Images()

    def __len__(self) -> int:
        return _WORDS

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def convert_tokens_to_ids(self, token: str) -> int:
        return self._ids(token)[0]

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        *,
        padding: Any = False,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        **unused: Any,
    ) -> BatchEncoding:
        """Text or a list of texts -> input_ids and attention_mask, and of images pixel_values."""
        rows = [self._ids(t) for t in ([text] if isinstance(text, str) else text)]
        if truncation and max_length is not None:
            rows = [row[:max_length] for row in rows]
        if isinstance(text, str) and return_tensors is None:
            return BatchEncoding({"input_ids": rows[0], "attention_mask": [1] * len(rows[0])})
        encoded = self.pad({"input_ids": rows}, padding, max_length, return_tensors=return_tensors)
        if images is not None:
            encoded.update(self.image_processor(images=images))
        return encoded

    def pad(
        self,
        encoded: Any,
        padding: Any = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **unused: Any,
    ) -> BatchEncoding:
        rows = encoded["input_ids"]
        length = max(len(row) for row in rows)
        if padding == "max_length":
            length = max_length or self.model_max_length
        missing = [length - len(row) if padding else 0 for row in rows]
        data = {
            "input_ids": [row + [_PAD] * m for row, m in zip(rows, missing, strict=True)],
            "attention_mask": [
                [1] * len(row) + [0] * m for row, m in zip(rows, missing, strict=True)
            ],
        }
        return BatchEncoding(data, tensor_type=return_tensors)

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **options: Any) -> Any:
        conversations = messages if isinstance(messages[0], list) else [messages]
        texts = ["".join(_content(turn) for turn in turns) for turns in conversations]
        if tokenize:
            options.pop("add_generation_prompt", None)
            return self(texts, **options)
        return texts if isinstance(messages[0], list) else texts[0]

    def decode(self, ids: Any, **unused: Any) -> str:
        return "".join(chr(32 + int(i)) for i in ids)

    def batch_decode(self, rows: Any, **unused: Any) -> list[str]:
        return [self.decode(row) for row in rows]

    @staticmethod
    def _ids(text: str) -> list[int]:
        return [_FIRST + ord(letter) % (_WORDS - _FIRST) for letter in text] or [_END]


def _content(turn: dict[str, Any]) -> str:
    content = turn["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


class _Images:
    """An image processor: an image is cut into four patches, whatever its size."""

    merge_size, patch_size = 2, 4

    def __call__(self, images: Any, **unused: Any) -> dict[str, Tensor]:
        flat = images if isinstance(images, (list, tuple)) else [images]
        flat = [
            image for group in flat for image in (group if isinstance(group, list) else [group])
        ]
        small = [torch.tensor(list(image.resize((2, 2)).tobytes())) / 255 for image in flat]
        return {
            "pixel_values": torch.cat([image.reshape(4, 3) for image in small]),
            "image_grid_thw": torch.tensor([[1, 2, 2]] * len(flat)),
        }


class Reader(nn.Module):
    """A text encoder: a token's hidden states depend on it, its place and the images."""

    def __init__(self, hidden: int = 32, layers: int = 2, seed: int = 7) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            hidden_size=hidden,
            d_model=hidden,
            num_hidden_layers=layers,
            model_type="stand-in",
            text_config=SimpleNamespace(hidden_size=hidden),
        )
        generator = torch.Generator().manual_seed(seed)
        self.words = nn.Parameter(torch.randn(_WORDS, hidden, generator=generator))
        self.places = nn.Parameter(0.3 * torch.randn(hidden, generator=generator))
        self.weights = nn.Parameter(
            torch.randn(layers, hidden, hidden, generator=generator) / hidden**0.5
        )
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.words.dtype

    @property
    def device(self) -> torch.device:
        return self.words.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPooling:
        """input_ids (N, L) -> hidden states (N, L, D) of every layer, pooled (N, D)."""
        place = torch.arange(input_ids.shape[1], device=self.device)[:, None] * self.places
        x = self.words[input_ids % _WORDS] + place.sin()
        if pixel_values is not None:
            x = x + pixel_values.mean()
        states = [x]
        for weight in self.weights:
            states.append((states[-1] @ weight).tanh() + states[-1] / 2)
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=states[-1].mean(1),
            hidden_states=tuple(states),
        )
