"""SiT: its forward against a plain second reading, its sizes, positions, first weights and
costs.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from close import assert_close, relative_error
from oracle import sit_forward
from tiny import random_sit
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import flowturbo as ft
from flowturbo.models import checkpoint
from flowturbo.models.checkpoint import build, load_sit, save_sit
from flowturbo.models.sit import SIT_CONFIGS, SiT, SiTConfig, config_from_state, sincos_positions


def inputs(
    config: SiTConfig, seed: int, n: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """x, t, y, and v for a refiner; the last label is the null class."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, config.channels, config.side, config.side)
    x, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    t = torch.rand(n, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(config.num_classes, (n,), generator=generator)
    y[-1] = config.null_class
    return (x, t, y, v) if config.reads_velocity else (x, t, y)


SMALL = {
    "patch 2": SiTConfig(hidden=96, depth=3, heads=4, patch=2, side=8, num_classes=10),
    "patch 4": SiTConfig(hidden=32, depth=2, heads=2, patch=4, side=16, num_classes=3),
    "patch 8": SiTConfig(hidden=40, depth=1, heads=5, patch=8, side=16, num_classes=10),
    "head_dim 72": SiTConfig(hidden=144, depth=2, heads=2, patch=2, side=6, num_classes=10),
    "one channel, 9 tokens": SiTConfig(
        hidden=24, depth=2, heads=1, patch=2, side=6, channels=1, num_classes=1
    ),
    "three channels, one token": SiTConfig(
        hidden=24, depth=2, heads=3, patch=2, side=2, channels=3, num_classes=5
    ),
}


def variants(config: SiTConfig) -> dict[str, SiTConfig]:
    return {
        f"{role}, {'learned sigma' if sigma else 'velocity only'}": replace(
            config, reads_velocity=role == "refiner", learned_sigma=sigma
        )
        for role, sigma in itertools.product(("predictor", "refiner"), (True, False))
    }


ALL = {
    f"{size}, {kind}": config
    for size, small in SMALL.items()
    for kind, config in variants(small).items()
}
every = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())


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
    given = inputs(config, 2, dtype=dtype)
    assert_close(model(*given), oracle(model, *given), bound)


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
    given = inputs(config, 22, dtype=torch.float32)
    weights = list(model.parameters())
    truth = model(*given)
    true_grads = torch.autograd.grad(truth.square().mean(), weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(*given)
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
    given = inputs(config, 6)
    generator = torch.Generator().manual_seed(7)
    out = model(*given)
    direction = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad((out * direction).sum(), list(named.values()), allow_unused=True)
    for name, grad in zip(named, grads, strict=True):
        assert grad is not None, name
        assert float(grad.abs().max()) > 1e-12, name


def test_rows_do_not_mix():
    config = ALL["patch 2, refiner, learned sigma"]
    model, given = random_sit(config, 8).double(), inputs(config, 9, n=4)
    together = model(*given)
    for i in range(4):
        assert_close(model(*(g[i : i + 1] for g in given)), together[i : i + 1], 1e-13)


def test_the_number_of_heads_matters():
    config = SMALL["patch 2"]
    model, given = random_sit(config, 10).double(), inputs(config, 11)
    other = build(replace(config, heads=2), model.state_dict())
    assert relative_error(other(*given), model(*given)) > 1e-3


# Sizes.

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


# Positions, first weights, cost.


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
def test_a_fresh_model_returns_zeros(config):
    model = SiT(config).reset_parameters(torch.Generator().manual_seed(12))
    x, *rest = inputs(config, 13, dtype=torch.float32)
    out = model(x, *rest)
    assert out.shape == x.shape
    assert torch.equal(out, torch.zeros_like(x))


def test_first_weights():
    """SiT's: Xavier for products, 0.02 normal for embeddings, zero for what modulates; and a
    function of the generator alone.
    """
    config = SiTConfig(hidden=192, depth=2, heads=3, patch=2, side=8)
    first = SiT(config).reset_parameters(torch.Generator().manual_seed(1)).state_dict()
    again = SiT(config).reset_parameters(torch.Generator().manual_seed(1)).state_dict()
    other = SiT(config).reset_parameters(torch.Generator().manual_seed(2)).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    for name, weight in first.items():
        if name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert not weight.any(), name
            continue
        if name == "pos_embed":
            assert torch.equal(weight[0], sincos_positions(192, 4))
            continue
        assert not torch.equal(weight, other[name]), name
        fan_out, fan_in = weight.flatten(1).shape
        wanted = (
            0.02
            if "t_embedder" in name or "y_embedder" in name
            else math.sqrt(2 / (fan_in + fan_out))
        )
        assert float(weight.std()) == pytest.approx(wanted, rel=0.1), name
        if "embedder.mlp" not in name and "table" not in name:
            assert float(weight.abs().max()) <= math.sqrt(3) * wanted * (1 + 1e-6)


@every
def test_macs_are_those_that_torch_counts(config):
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        model = SiT(config)
    given = [g.to("meta") for g in inputs(config, 14, n=1, dtype=torch.float32)]
    with counter:
        model(*given)
    assert counter.get_total_flops() == 2 * config.macs()


def test_published_macs():
    config = SIT_CONFIGS["SiT-XL/2"]
    assert config.macs() == pytest.approx(118.62e9, rel=0.005)
    assert config.refiner().macs() == pytest.approx(4.26e9, rel=0.005)


# Each weight is held once.


@pytest.mark.parametrize("config", list(ALL.values())[:4], ids=list(ALL)[:4])
def test_a_built_model_holds_the_given_tensors(config):
    state = {k: v.clone() for k, v in random_sit(config, 15).state_dict().items()}
    built = build(config, state)
    assert {k: v.data_ptr() for k, v in built.state_dict().items()} == {
        k: v.data_ptr() for k, v in state.items()
    }
    assert not any(p.requires_grad for p in built.parameters())
    assert not built.training


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_loading_copies_no_weight_that_stands_well(tmp_path, monkeypatch, suffix):
    config = ALL["patch 2, predictor, learned sigma"]
    model = random_sit(config, 16)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save({"ema": model.state_dict()}, path)
    else:
        save_sit(path, model)
    read, original = [], checkpoint.read_state
    monkeypatch.setattr(
        checkpoint, "read_state", lambda path: read.append(original(path)) or read[-1]
    )
    loaded = ft.load(path, heads=4, device="cpu", dtype=torch.float32).predictor
    [(state, _)] = read
    copied = [
        state[k] for k, v in loaded.state_dict().items() if v.data_ptr() != state[k].data_ptr()
    ]
    assert all(
        weight.data_ptr() % 64 for weight in copied
    )  # products of what stands so round otherwise
    assert not copied or suffix == ".safetensors"


def test_heun_and_pseudo_corrector_share_one_predictor():
    config = SMALL["patch 4"]
    model = ft.load(
        random_sit(config, 17).double(),
        refiner=random_sit(config.refiner(), 18).double(),
        device="cpu",
    )
    called = []
    for module in (model.predictor, model.refiner):
        module.x_embedder.register_forward_hook(lambda m, *_: called.append(m))
    ft.sample(model, "H1P2R1", labels=[1], guidance=2.0, seed=0)
    assert [m is model.predictor.x_embedder for m in called] == [True] * 4 + [False] * 2
    assert called[-1] is model.refiner.x_embedder


def test_a_module_is_taken_as_it_is():
    predictor = random_sit(SMALL["patch 4"], 19)
    before = {k: v.data_ptr() for k, v in predictor.state_dict().items()}
    model = ft.load(predictor, device="cpu", dtype=torch.float32)
    assert model.predictor is predictor
    assert {k: v.data_ptr() for k, v in predictor.state_dict().items()} == before


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_a_file_keeps_its_dtype(tmp_path, dtype):
    model = random_sit(SMALL["patch 4"], 20).to(dtype)
    save_sit(tmp_path / "m.safetensors", model)
    loaded = load_sit(tmp_path / "m.safetensors", "predictor").model
    assert {v.dtype for v in loaded.state_dict().values()} == {dtype}
    assert (
        ft.load(tmp_path / "m.safetensors", device="cpu").predictor.state_dict()["pos_embed"].dtype
        == torch.float32
    )


@pytest.mark.parametrize("convention", ["sit", "repa"])
def test_fp8_changes_the_velocity_by_some_percent(convention):
    config = replace(SMALL["patch 4"], hidden=96, heads=4, depth=4)
    plain, fp8 = (
        ft.load(
            random_sit(config, 21),
            random_sit(config.refiner(), 22),
            device="cpu",
            convention=convention,
            quantize=quantize,
        )
        for quantize in (None, "fp8")
    )
    x, t, y = torch.randn(4, *plain.latent_shape), torch.rand(4), torch.arange(4)
    truth = plain.predictor(x, t, y)
    error = float((fp8.predictor(x, t, y) - truth).norm() / truth.norm())
    assert 1e-3 < error < 0.1
    latents = [ft.sample(model, "H1P1R1", [1, 2], guidance=1.5, seed=0) for model in (plain, fp8)]
    assert 1e-4 < float((latents[1] - latents[0]).norm() / latents[0].norm()) < 0.2


def test_only_the_predictors_blocks_are_in_fp8():
    model = ft.load(
        random_sit(SMALL["patch 4"], 23),
        random_sit(SMALL["patch 4"].refiner(), 24),
        device="cpu",
        quantize="fp8",
    )
    kinds = {name: value.dtype for name, value in model.predictor.state_dict().items()}
    quantised = {name for name, dtype in kinds.items() if dtype == torch.float8_e4m3fn}
    assert quantised == {
        f"blocks.{i}.{part}.weight"
        for i in range(len(model.predictor.blocks))
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert {value.dtype for value in model.refiner.state_dict().values()} == {torch.float32}
    assert model.predictor.quantize_() is model.predictor  # again: nothing more to do
    with pytest.raises(ValueError, match="quantize must be 'fp8' or None, got 'int8'"):
        ft.load("digits", quantize="int8")
    refiner = random_sit(SMALL["patch 4"].refiner(), 25).quantize_()
    with pytest.raises(ValueError, match="not quantised"):
        refiner.refiner_weights()
