"""Small state dicts with the published files' keys, and what loads them right."""

from argparse import Namespace

import recipe
import torch
from close import relative_error
from oracle import sit_forward
from torch import Tensor

from flowturbo.models.sit import SiT, SiTConfig

HEADS = 4
SIZES = dict(hidden=96, heads=HEADS, side=8, classes=10)


def predictor_state(seed: int = 1, depth: int = 2, **sizes: int) -> dict[str, Tensor]:
    """In the published format: learned sigma, a pos_embed of its own."""
    return recipe.state(seed, depth=depth, in_channels=4, **{**SIZES, **sizes})


def refiner_state(seed: int = 2, depth: int = 1, **sizes: int) -> dict[str, Tensor]:
    return recipe.state(seed, depth=depth, in_channels=8, **{**SIZES, **sizes})


def repa_state(seed: int = 3) -> dict[str, Tensor]:
    """As REPA's trainer saves: no learned sigma, and projectors that only its training needs."""
    state = predictor_state(seed)
    state |= {
        f"final_layer.linear.{kind}": state[f"final_layer.linear.{kind}"][:16].clone()
        for kind in ("weight", "bias")
    }
    for layer in (0, 2, 4):
        state |= {
            f"projectors.0.{layer}.weight": torch.randn(8, 8),
            f"projectors.0.{layer}.bias": torch.randn(8),
        }
    return state


def inputs(seed: int, n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, 8, 8, generator=generator)
    return x, torch.rand(n, generator=generator), torch.randint(11, (n,), generator=generator)


def agrees(model: SiT, state: dict[str, Tensor], seed: int = 4) -> bool:
    """Whether the model is the one that this state dict describes."""
    x, t, y = inputs(seed)
    if model.config.reads_velocity:
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
        return (
            relative_error(model(x, t, y, v), sit_forward(state, HEADS, torch.cat([x, v], 1), t, y))
            < 2e-6
        )
    return relative_error(model(x, t, y), sit_forward(state, HEADS, x, t, y)) < 2e-6


def train_file(model: dict[str, Tensor], ema: dict[str, Tensor]) -> dict[str, object]:
    """What SiT's train.py saves."""
    weights = [torch.nn.Parameter(w.clone()) for w in list(model.values())[:3]]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    sum(w.square().sum() for w in weights).backward()
    optimizer.step()
    args = Namespace(
        model="SiT-XL/2",
        image_size=256,
        num_classes=1000,
        ckpt=None,
        path_type="Linear",
        cfg_scale=4.0,
        vae=["ema"],
    )
    return {"model": model, "ema": ema, "opt": optimizer.state_dict(), "args": args}


def sit(**changes: object) -> SiT:
    sizes = dict(hidden=32, depth=1, heads=2, patch=2, side=8, num_classes=10)
    return SiT(SiTConfig(**{**sizes, **changes})).reset_parameters(torch.Generator().manual_seed(1))
