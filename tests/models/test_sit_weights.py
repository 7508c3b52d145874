"""Weights of SiT: first values, built from tensors, each held once, and in fp8."""

import math
from dataclasses import replace

import pytest
import torch
from sit_sizes import ALL, SMALL, every, inputs
from tiny import random_sit

import flowturbo as ft
from flowturbo.models import checkpoint
from flowturbo.models.checkpoint import build, load_sit, save_sit
from flowturbo.models.sit import SiT, SiTConfig, sincos_positions


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
    [(state, _, _)] = read
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
