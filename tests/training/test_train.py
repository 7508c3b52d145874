"""Training: what is learnt is a function of the settings alone, however many processes do it."""

import contextlib
import math
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from close import relative_error
from torch import Tensor
from training_runs import CLASSES, ENVIRONMENT, TINY, contents, learnt, log_of, same_bits, tiny

import flowturbo as ft
from flowturbo.data.latents import load_data, order
from flowturbo.models.sit import SiT
from flowturbo.runtime.rng import StepRandom
from flowturbo.training.objectives import FlowMatching
from flowturbo.training.train import Distill, Train, distill, train


def test_the_loss_falls_on_the_digits(tmp_path):
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    path = train(tiny(out, "digits", hidden=32, steps=100, batch_size=24, lr=5e-3, save_every=100))
    losses = [line["loss"] for line in log_of(out)]
    assert len(losses) == 100
    assert losses[0] == pytest.approx(
        1.72, rel=0.1
    )  # a fresh model says zero: the power of the data, 0.72, and of the noise
    assert np.mean(losses[-20:]) < 0.65 * np.mean(losses[:5])  # 0.50 to 0.52 were measured
    assert path == out / "model.safetensors"
    model = ft.load(path, device="cpu")
    assert (model.latent_shape, model.num_classes) == ((1, 8, 8), 10)
    assert ft.sample(model, "H2", labels=[1, 2], guidance=1.5, seed=0).isfinite().all()


def test_training_is_the_plain_loop(tmp_path, data):
    """Written out with torch's own AdamW, to the last bit; the average by its formula."""
    settings = tiny(
        tmp_path / "run",
        data,
        steps=7,
        lr=3e-3,
        weight_decay=0.1,
        warmup=4,
        ema=0.8,
        seed=5,
        label_drop=0.4,
    )
    train(settings)
    train(replace(settings, out=tmp_path / "start", steps=1, lr=0.0))
    start = {
        k.removeprefix("state network."): v
        for k, v in contents(tmp_path / "start").items()
        if k.startswith("state network.")
    }
    latents = load_data(data)
    network = SiT(settings.config(latents))
    network.load_state_dict(start)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.1)
    objective = FlowMatching(CLASSES, 0.4)
    average: dict[str, Tensor] = {}
    for step in range(7):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 4)
        draws = StepRandom(5, step, range(8))
        x, y = latents.batch(order(40, 5, 8 * step, 8), draws)
        optimizer.zero_grad()
        objective(network, x, y, draws).backward()
        optimizer.step()
        for name, weight in network.state_dict().items():
            before = average.get(name, weight)
            average[name] = (0.8 * before.double() + 0.2 * weight.double()).float()
    left = contents(settings.out)
    for name, weight in network.state_dict().items():
        assert torch.equal(left[f"state network.{name}"], weight), name
        assert torch.equal(left[f"state ema.module.{name}"], left[f"model {name}"]), name
        assert torch.allclose(left[f"model {name}"], average[name], rtol=1e-5, atol=1e-7), name
    assert not torch.equal(
        left["model final_layer.linear.weight"], left["state network.final_layer.linear.weight"]
    )


@pytest.mark.parametrize(
    "change",
    [{}, {"seed": 1}, {"lr": 2e-3}, {"label_drop": 0.5}, {"clip": 0.01}, {"ema": 0.5}],
    ids=str,
)
def test_the_same_settings_learn_the_same(tmp_path, data, change):
    for name in ("a", "b"):
        train(tiny(tmp_path / name, data, **change))
    assert same_bits(contents(tmp_path / "a"), contents(tmp_path / "b"))
    assert learnt(tmp_path / "a") == learnt(tmp_path / "b")
    train(tiny(tmp_path / "c", data))
    assert same_bits(contents(tmp_path / "a"), contents(tmp_path / "c")) == (not change)


def test_how_often_is_saved_and_logged_changes_nothing(tmp_path, data):
    train(tiny(tmp_path / "a", data))
    train(tiny(tmp_path / "b", data, save_every=1, log_every=4))
    assert same_bits(contents(tmp_path / "a"), contents(tmp_path / "b"))
    often, seldom = learnt(tmp_path / "a"), learnt(tmp_path / "b")
    assert [line[0] for line in seldom] == [4, 8, 12]
    for k, line in enumerate(seldom):
        assert line[1] == pytest.approx(
            np.mean([loss for _, loss, _, _ in often[4 * k : 4 * k + 4]])
        )
        assert line[2:] == often[4 * k + 3][2:]


class Watched(torch.optim.AdamW):
    """AdamW that notes the gradient's norm and the learning rate at every step."""

    seen: list[tuple[float, float]]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        grads = [p.grad.double().norm() for group in self.param_groups for p in group["params"]]
        self.seen.append((float(torch.stack(grads).norm()), self.param_groups[0]["lr"]))
        return super().step(*args, **kwargs)


def watched(
    monkeypatch, settings: Train
) -> tuple[list[float], list[float], list[dict[str, float]]]:
    monkeypatch.setattr(Watched, "seen", [], raising=False)
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    train(settings)
    norms, rates = zip(*Watched.seen, strict=True)
    return list(norms), list(rates), log_of(settings.out)


def test_clipping_bounds_the_gradient(monkeypatch, tmp_path, data):
    norms, _, log = watched(monkeypatch, tiny(tmp_path / "free", data))
    assert norms == pytest.approx([line["grad_norm"] for line in log], rel=1e-5)
    bound = sorted(norms)[6]
    clipped, _, log = watched(monkeypatch, tiny(tmp_path / "clipped", data, clip=bound))
    assert max(clipped) <= bound * (1 + 1e-6)
    logged = [line["grad_norm"] for line in log]
    assert max(logged) > bound  # the log shows the norm before it is cut
    assert clipped == pytest.approx([min(bound, norm) for norm in logged], rel=1e-5)


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_learning_rates(monkeypatch, tmp_path, data, warmup):
    ramp = [min(1, (k + 1) / warmup) if warmup else 1 for k in range(12)]
    _, rates, log = watched(monkeypatch, tiny(tmp_path / "constant", data, warmup=warmup))
    assert rates == pytest.approx([1e-3 * r for r in ramp])
    assert [line["lr"] for line in log] == rates
    _, rates, _ = watched(
        monkeypatch, tiny(tmp_path / "cosine", data, warmup=warmup, schedule="cosine")
    )
    assert rates == pytest.approx(
        [1e-3 * r * (1 + math.cos(math.pi * k / 12)) / 2 for k, r in enumerate(ramp)]
    )
    assert rates[-1] < 1e-3 * 0.02


def test_the_average_follows_its_formula(tmp_path, data):
    """By going on one step at a time: it starts as the weights after the first step."""
    expected: dict[str, Tensor] = {}
    for steps in range(1, 7):
        train(tiny(tmp_path, data, steps=steps))
        left = contents(tmp_path)
        names = [k.removeprefix("state network.") for k in left if k.startswith("state network.")]
        for name in names:
            weight = left[f"state network.{name}"].double()
            expected[name] = weight if steps == 1 else 0.9 * expected[name] + 0.1 * weight
            assert torch.allclose(
                left[f"model {name}"].double(), expected[name], rtol=1e-5, atol=1e-7
            ), (steps, name)


OPTIONS = dict(
    optimizer="muon" if hasattr(torch.optim, "Muon") else "adamw",
    **dict(class_weights="root", sides=(2,), sides_share=0.5, schedule="wsd", decay_steps=4),
    times="logit-normal",
)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path, data, teacher):
    """Under torchrun, with gloo. Not to the last bit, since sums over the batch round in another
    order, and AdamW makes a step of size lr of any gradient, however small: measured after 12
    steps, 5e-6 for the keys' bias, whose true gradient is zero, and 4e-7 for all else."""
    script = tmp_path / "run.py"
    common = {k: v for k, v in TINY.items() if k not in ("model", "hidden", "patch")}
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(5)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    script.write_text(f"""
import os, torch
from pathlib import Path
from flowturbo.training.train import Distill, Train, distill, train
here, data, ports = Path({str(tmp_path)!r}), {data!r}, {ports!r}
assert os.environ["WORLD_SIZE"] == "2"
settings = {TINY!r}

def alone(work, asked):
    # A store of its own for each run: processes that meet a second time in one store
    # may read addresses of the first.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ["MASTER_PORT"] = str(ports.pop())
    work(asked)

alone(train, Train(out=here / "two", data=data, **settings))
alone(train, Train(out=here / "resumed by two", data=data, **settings))
alone(train, Train(out=here / "two, options", data=data, **settings, **{OPTIONS!r}))
alone(distill, Distill(out=here / "two-refiner", data=data, teacher={str(teacher)!r}, **{common!r}))
try:
    alone(train, Train(out=here / "odd", data=data, **dict(settings, batch_size=5)))
except ValueError as error:
    (here / ("refused by " + os.environ["RANK"])).write_text(str(error))
""")
    train(tiny(tmp_path / "resumed by two", data, steps=5))
    words = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = [sys.executable, *words.split(), str(script)]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    train(tiny(tmp_path / "one", data))
    train(tiny(tmp_path / "one, options", data, **OPTIONS))
    distill(Distill(out=tmp_path / "one-refiner", data=data, teacher=str(teacher), **common))
    for one, two, bound in (
        ("one", "two", 1e-4),
        ("one", "resumed by two", 1e-4),
        ("one-refiner", "two-refiner", 1e-4),
        # Muon computes its updates in bfloat16, which rounds to 4e-3: 5e-3 was measured.
        ("one, options", "two, options", 2e-2),
    ):
        assert agree(contents(tmp_path / one), contents(tmp_path / two), bound)
        for a, b in zip(learnt(tmp_path / one), learnt(tmp_path / two), strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    for rank in (0, 1):
        assert (
            "batch_size must be a multiple of the 2 processes, got 5"
            in (tmp_path / f"refused by {rank}").read_text()
        )
    assert not (tmp_path / "odd" / "model.safetensors").exists()


def agree(a: dict[str, Tensor], b: dict[str, Tensor], bound: float) -> bool:
    """Each tensor to `bound`, relative."""
    return a.keys() == b.keys() and all(relative_error(b[name], a[name]) <= bound for name in a)


def test_a_run_that_explodes_says_so(tmp_path, data):
    """And saves no weights that are not finite."""
    with pytest.raises(FloatingPointError, match=r"the loss is .* at step .*lower lr"):
        train(tiny(tmp_path, data, lr=1e30, save_every=1, log_every=100, steps=50))
    assert all(v.isfinite().all() for v in contents(tmp_path).values())
