"""The dtypes that each rival claims, and their check."""

from __future__ import annotations

import subjects
import torch

import flowturbo as ft


def claimed(rival: str) -> torch.dtype:
    """Of the weights of the predictor's blocks' products, on a GPU."""
    return {"fp8": torch.float8_e4m3fn, "autocast": torch.float32}.get(
        rival.split("-")[-1], torch.bfloat16
    )


def check_dtypes(rival: str, model: ft.FlowModel) -> None:
    products = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    seen = 0
    for name, tensor in (*model.predictor.named_parameters(), *model.predictor.named_buffers()):
        if name.endswith(products):
            assert tensor.dtype == claimed(rival), name
            seen += 1
        elif name.endswith("_scale"):
            assert tensor.dtype == torch.float32, name
        else:
            assert tensor.dtype == (torch.float32 if rival == "autocast" else torch.bfloat16), name
    assert seen == 4 * subjects.subject(64, 1, False).predictor.config.depth
    for tensor in model.refiner.parameters():
        assert tensor.dtype == (torch.float32 if rival == "autocast" else torch.bfloat16)
