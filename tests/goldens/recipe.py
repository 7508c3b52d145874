"""Seeded checkpoints in the published SiT / FlowTurbo format, and the cases of goldens.npz.

goldens.npz holds, under each case's name, the latents (N, 4, S, S), float32, that the public code
(shiml20/FlowTurbo, models_assemble.py, run on the CPU in float32) returns for the conditional half.
"""

import numpy as np
import torch
from torch import Tensor

CONFIGS: dict[str, dict[str, int]] = {  # hidden size, heads, latent side, classes
    "head_dim_24": {"hidden": 96, "heads": 4, "side": 8, "classes": 10},
    "head_dim_72": {"hidden": 72, "heads": 1, "side": 16, "classes": 10},
}
CASES: list[tuple[str, str, tuple[int, int, int], float]] = [
    # name, config, (N_H, N_P, N_R), guidance scale
    ("h1p5r3", "head_dim_24", (1, 5, 3), 4.0),
    ("h2p4r2", "head_dim_24", (2, 4, 2), 1.5),
    ("h2", "head_dim_24", (2, 0, 0), 1.5),
    ("h1r2", "head_dim_24", (1, 0, 2), 2.0),
    ("p3", "head_dim_24", (0, 3, 0), 1.5),
    ("h1p2r1_hd72", "head_dim_72", (1, 2, 1), 3.0),
]


def shapes(
    hidden: int, heads: int, side: int, classes: int, depth: int, in_channels: int
) -> dict[str, tuple[int, ...]]:
    """{parameter name: shape} of a SiT with patch 2 and learned sigma (8 output channels)."""
    d = hidden
    out: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (side // 2) ** 2, d),
        "x_embedder.proj.weight": (d, in_channels, 2, 2),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (classes + 1, d),
        "final_layer.linear.weight": (32, d),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    for i in range(depth):
        b = f"blocks.{i}."
        out |= {
            b + "attn.qkv.weight": (3 * d, d),
            b + "attn.qkv.bias": (3 * d,),
            b + "attn.proj.weight": (d, d),
            b + "attn.proj.bias": (d,),
            b + "mlp.fc1.weight": (4 * d, d),
            b + "mlp.fc1.bias": (4 * d,),
            b + "mlp.fc2.weight": (d, 4 * d),
            b + "mlp.fc2.bias": (d,),
            b + "adaLN_modulation.1.weight": (6 * d, d),
            b + "adaLN_modulation.1.bias": (6 * d,),
        }
    return out


def state(seed: int, **sizes: int) -> dict[str, Tensor]:
    """A state dict filled by numpy's PCG64 in the order of sorted names."""
    rng = np.random.default_rng(seed)
    sd: dict[str, Tensor] = {}
    for name, shape in sorted(shapes(**sizes).items()):
        if len(shape) == 1:
            scale = 0.02
        elif "pos_embed" in name or "table" in name:
            scale = 0.5
        else:
            scale = 0.7 / np.sqrt(np.prod(shape[1:]))
        sd[name] = torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))
    return sd


def checkpoints(config: str, depth: int = 28) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(predictor of so many blocks, refiner of 1 block) state dicts."""
    sizes = CONFIGS[config]
    predictor = state(101, depth=depth, in_channels=4, **sizes)
    return predictor, state(102, depth=1, in_channels=8, **sizes)


def inputs(config: str) -> tuple[Tensor, Tensor]:
    """noise (2, 4, side, side) and labels (2,)."""
    side = CONFIGS[config]["side"]
    noise = np.random.default_rng(103).standard_normal((2, 4, side, side)).astype(np.float32)
    return torch.from_numpy(noise), torch.tensor([1, 8])
