"""Training settings, models and data that are refused."""

import math

import pytest
import torch
from training_runs import tiny

from flowturbo.training.train import Settings, train


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"steps": 0},
            {"steps": -1},
            {"batch_size": 0},
            {"save_every": 0},
            {"log_every": -5},
            {"lr": -1e-3},
            {"lr": math.nan},
        ),
        *(
            {"weight_decay": -0.1},
            {"warmup": -1},
            {"clip": -1.0},
            {"clip": math.nan},
            {"ema": 1.1},
            {"ema": -0.1},
        ),
        *({"label_drop": 1.5}, {"label_drop": -0.1}, {"label_drop": math.nan}, {"seed": -1}),
        *({"schedule": "linear"}, {"precision": "fp8"}),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(tmp_path, change):
    [name] = change
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Settings(out=tmp_path, **change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "SiT-XXL/2"}, "model must be 'custom' or one of SiT-S/2, .*, got 'SiT-XXL/2'"),
        ({"heads": 3}, "heads must divide the hidden size 16, got 3"),
        ({"patch": 3}, "patch must divide the latent side 4, got 3"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"data": "nowhere"}, "data must be .*'nowhere'"),
        ({"data": "gone.npz"}, r"gone\.npz does not exist"),
    ],
    ids=str,
)
def test_models_and_data_that_are_not_there_are_refused(tmp_path, data, change, message):
    with pytest.raises(ValueError, match=message):
        train(tiny(tmp_path / "run", **{"data": data, **change}))
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="device 'cuda' was asked for"):
        train(tiny(tmp_path, data, device="cuda"))
