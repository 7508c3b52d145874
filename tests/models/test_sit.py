"""SiT: its forward against a plain second reading, its sizes, positions and costs."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from close import assert_close, relative_error
from oracle import sit_forward
from sit_sizes import ALL, SMALL, every, inputs
from tiny import random_sit
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowturbo.models.checkpoint import build
from flowturbo.models.sit import SIT_CONFIGS, SiT, SiTConfig, config_from_state, sincos_positions


def oracle(model: SiT, x: Tensor, t: Tensor, y: Tensor, v: Tensor | None = None) -> Tensor:
    both = x if v is None else torch.cat([x, v], dim=1)
    return sit_forward(
        model.state_dict(), model.config.heads, both, t, y, velocity_channels=model.config.channels
    )


# float32: the network of 96 x 3 blocks errs by 4e-7 against its own float64 self, measured, in
# either reading.
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 2e-6), (torch.float64, 1e-14)], ids=["float32", "float64"]
)
@every
def test_forward_agrees_with_a_second_reading(config, dtype, bound):
    model = random_sit(config, seed=1).to(dtype)
    batch = inputs(config, 2, dtype=dtype)
    assert_close(model(*batch), oracle(model, *batch), bound)


@pytest.mark.parametrize("seed", range(3))
def test_float32_against_float64(seed):
    config = ALL["head_dim 72, predictor, learned sigma"]
    model = random_sit(config, seed)
    x, t, y = inputs(config, seed, dtype=torch.float32)
    got = model(x, t, y)
    assert got.dtype == torch.float32
    assert_close(got, oracle(model.double(), x.double(), t.double(), y), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_runs_with_times_in_float32(dtype):
    """As the sampler calls it: times are never rounded to the weights' dtype."""
    config = ALL["patch 2, refiner, learned sigma"]
    model = random_sit(config, 3).double()
    x, t, y, v = inputs(config, 4)
    truth = model(x, t, y, v)
    got = model.to(dtype)(x.to(dtype), t.float(), y, v.to(dtype))
    assert got.dtype == dtype
    assert_close(got, truth, 3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["predictor", "refiner"])
def test_autocast_runs_and_trains(kind):
    """As training on CUDA does: float32 weights, products in bfloat16. Results and gradients err by
    half its eps, measured.
    """
    config = ALL[f"patch 2, {kind}, velocity only"]
    model = random_sit(config, 21).requires_grad_(True)
    batch = inputs(config, 22, dtype=torch.float32)
    weights = list(model.parameters())
    truth = model(*batch)
    true_grads = torch.autograd.grad(truth.square().mean(), weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(*batch)
        loss = got.float().square().mean()
    grads = torch.autograd.grad(loss, weights)
    eps = torch.finfo(torch.bfloat16).eps
    assert 0 < relative_error(got, truth) < 2 * eps
    assert all(g.dtype == torch.float32 for g in grads)
    together, true_together = (torch.cat([g.flatten() for g in gs]) for gs in (grads, true_grads))
    assert_close(together, true_together, 2 * eps)


@every
def test_every_parameter_matters(config):
    model = random_sit(config, seed=5).double().requires_grad_(True)
    batch = inputs(config, 6)
    generator = torch.Generator().manual_seed(7)
    out = model(*batch)
    direction = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad((out * direction).sum(), list(named.values()), allow_unused=True)
    for name, grad in zip(named, grads, strict=True):
        assert grad is not None, name
        assert float(grad.abs().max()) > 1e-12, name


def test_rows_do_not_mix():
    config = ALL["patch 2, refiner, learned sigma"]
    model, batch = random_sit(config, 8).double(), inputs(config, 9, n=4)
    together = model(*batch)
    for i in range(4):
        assert_close(model(*(g[i : i + 1] for g in batch)), together[i : i + 1], 1e-13)


def test_the_number_of_heads_matters():
    config = SMALL["patch 2"]
    model, batch = random_sit(config, 10).double(), inputs(config, 11)
    other = build(replace(config, heads=2), model.state_dict())
    assert relative_error(other(*batch), model(*batch)) > 1e-3


PUBLISHED = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size, patch):
    config = SIT_CONFIGS[f"SiT-{size}/{patch}"]
    assert (config.hidden, config.depth, config.heads) == PUBLISHED[size]
    assert (config.patch, config.side, config.channels, config.num_classes) == (patch, 32, 4, 1000)
    assert config.learned_sigma
    assert config.null_class == 1000
    with torch.device("meta"):
        state = SiT(config).state_dict()
        refiner = SiT(config.refiner()).state_dict()
    hidden = config.hidden
    assert state["blocks.0.attn.qkv.weight"].shape == (3 * hidden, hidden)
    assert state["x_embedder.proj.weight"].shape == (hidden, 4, patch, patch)
    assert refiner["x_embedder.proj.weight"].shape == (hidden, 8, patch, patch)
    assert state["final_layer.linear.weight"].shape == (8 * patch**2, hidden)
    assert state["pos_embed"].shape == (1, (32 // patch) ** 2, hidden)
    # Heads too are known from the width, so that a published file needs no argument.
    assert config_from_state(state) == config
    assert config_from_state(refiner, reads_velocity=True) == config.refiner()


def test_all_sizes_are_there():
    assert list(SIT_CONFIGS) == [f"SiT-{size}/{patch}" for size in PUBLISHED for patch in (2, 4, 8)]


def test_parameter_names_are_the_published():
    blocks = [
        f"blocks.{i}.{part}.{kind}"
        for i in range(2)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    ]
    ends = [
        f"{part}.{kind}"
        for part in (
            "x_embedder.proj",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
            "final_layer.linear",
            "final_layer.adaLN_modulation.1",
        )
        for kind in ("weight", "bias")
    ]
    config = SMALL["patch 4"]
    assert set(SiT(config).state_dict()) == {
        "pos_embed",
        "y_embedder.embedding_table.weight",
        *blocks,
        *ends,
    }


def test_published_parameter_counts():
    """The published counts hold pos_embed (T * D), which is a parameter without gradient there and
    a buffer here.
    """
    with torch.device("meta"):
        predictor, refiner = SiT(SIT_CONFIGS["SiT-XL/2"]), SiT(SIT_CONFIGS["SiT-XL/2"].refiner())
    for model, published in ((predictor, 675_129_632), (refiner, 29_708_960)):
        assert sum(t.numel() for t in model.state_dict().values()) == published
        assert sum(p.numel() for p in model.parameters()) == published - 256 * 1152


@every
def test_sizes_are_read_off_the_tensors(config):
    state = SiT(config).state_dict()
    assert (
        config_from_state(state, reads_velocity=config.reads_velocity, heads=config.heads) == config
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": 98, "heads": 7}, "hidden must be a multiple of 4"),
        ({"heads": 5}, "heads must divide the hidden size 96, got 5"),
        ({"side": 9}, "patch must divide the latent side 9"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"patch": -2}, "patch must be at least 1, got -2"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"channels": 0}, "channels must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    sizes = dict(hidden=96, depth=3, heads=4, patch=2, side=8)
    with pytest.raises(ValueError, match=message):
        SiTConfig(**{**sizes, **change})


@pytest.mark.parametrize("hidden, side", [(8, 1), (8, 3), (72, 4), (1152, 16)])
def test_positions_hold_the_column_first(hidden, side):
    """DiT's layout, number by number: sines then cosines of the column, then sines and cosines of
    the row.
    """
    got = sincos_positions(hidden, side)
    assert got.shape == (side * side, hidden)
    assert got.dtype == torch.float32
    quarter = hidden // 4
    for row, column in itertools.product(range(side), repeat=2):
        expected = []
        for place in (column, row):
            angles = [place * 10_000 ** (-k / quarter) for k in range(quarter)]
            expected += [*map(math.sin, angles), *map(math.cos, angles)]
        assert torch.equal(
            got[row * side + column], torch.tensor(expected, dtype=torch.float64).float()
        )


@every
def test_macs_are_those_that_torch_counts(config):
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        model = SiT(config)
    batch = [g.to("meta") for g in inputs(config, 14, n=1, dtype=torch.float32)]
    with counter:
        model(*batch)
    assert counter.get_total_flops() == 2 * config.macs()


def test_published_macs():
    config = SIT_CONFIGS["SiT-XL/2"]
    assert config.macs() == pytest.approx(118.62e9, rel=0.005)
    assert config.refiner().macs() == pytest.approx(4.26e9, rel=0.005)
