"""Training: what is learnt is a function of the settings alone, through kills, resumptions and
however many processes.
"""

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from close import relative_error
from paths import ROOT
from torch import Tensor

import flowturbo as ft
from flowturbo.data.latents import load_data, order
from flowturbo.models.checkpoint import load_sit
from flowturbo.models.sit import SiT
from flowturbo.runtime.rng import StepRandom
from flowturbo.storage import files
from flowturbo.storage.files import CheckpointError, load_tensors
from flowturbo.training.objectives import FlowMatching
from flowturbo.training.train import Distill, Settings, Train, distill, train

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
CLASSES = 3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """40 latents of 2 x 4 x 4 in 3 classes, each class a pattern with noise on it."""
    rng = np.random.default_rng(1)
    labels = np.arange(40) % CLASSES
    patterns = rng.standard_normal((CLASSES, 2, 4, 4))
    path = tmp_path_factory.mktemp("data") / "latents.npz"
    np.savez(
        path,
        latents=(patterns[labels] + 0.1 * rng.standard_normal((40, 2, 4, 4))).astype(np.float32),
        labels=labels,
    )
    return str(path)


TINY: dict[str, Any] = dict(
    model="custom",
    hidden=16,
    depth=1,
    heads=2,
    batch_size=8,
    steps=12,
    lr=1e-3,
    ema=0.9,
    save_every=5,
    log_every=1,
    device="cpu",
)


def tiny(out: Path, data: str, **changes: Any) -> Train:
    return Train(out=out, data=data, **{**TINY, **changes})


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def contents(out: Path) -> dict[str, Tensor]:
    """All tensors that a run left: the model's and the state's."""
    found = {}
    for name in ("model", "state"):
        tensors, described = load_tensors(out / f"{name}.safetensors")
        assert described is not None
        steps = described["step"] if name == "state" else described["provenance"]["steps"]
        found |= {f"{name} {k}": v for k, v in tensors.items()} | {
            f"{name}, steps": torch.tensor(steps)
        }
    return found


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def learnt(out: Path) -> list[tuple[float, ...]]:
    """The log without its clock."""
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in log_of(out)]


# What is learnt.


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


# Going on.


def test_a_run_in_pieces_is_the_run_in_one(tmp_path, data):
    train(tiny(tmp_path / "one", data))
    for steps in (1, 4, 5, 11, 12, 12):
        train(tiny(tmp_path / "many", data, steps=steps))
    assert same_bits(contents(tmp_path / "one"), contents(tmp_path / "many"))
    assert learnt(tmp_path / "one") == learnt(tmp_path / "many")


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


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"lr": 2e-3},
            {"batch_size": 4},
            {"hidden": 24},
            {"seed": 3},
            {"ema": 0.99},
            {"clip": 1.0},
            {"label_drop": 0.2},
        ),
        *(
            {"schedule": "cosine"},
            {"weight_decay": 0.1},
            {"warmup": 3},
            {"depth": 2},
            {"precision": "fp32"},
        ),
    ],
    ids=str,
)
def test_other_settings_do_not_go_on(tmp_path, data, change):
    train(tiny(tmp_path, data, steps=2))
    before = contents(tmp_path)
    [(name, value)] = change.items()
    with pytest.raises(
        ValueError, match=f"{name} was .* and is now {value!r}.*choose another folder as out"
    ):
        train(tiny(tmp_path, data, steps=2, **change))
    assert same_bits(before, contents(tmp_path))


def test_settings_that_may_change(tmp_path, data):
    train(tiny(tmp_path / "a", data, steps=2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train(
        tiny(
            tmp_path / "b",
            data,
            steps=12,
            save_every=3,
            log_every=2,
            device=None if not torch.cuda.is_available() else "cpu",
        )
    )
    train(tiny(tmp_path / "c", data))
    assert same_bits(contents(tmp_path / "b"), contents(tmp_path / "c"))


def test_a_cosine_is_as_long_as_it_began(tmp_path, data):
    train(tiny(tmp_path, data, steps=3, schedule="cosine"))
    with pytest.raises(ValueError, match="steps was 3 and is now 4"):
        train(tiny(tmp_path, data, steps=4, schedule="cosine"))
    train(tiny(tmp_path, data, steps=3, schedule="cosine"))


def test_a_damaged_state_does_not_go_on(tmp_path, data):
    train(tiny(tmp_path, data, steps=2))
    path = tmp_path / "state.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged"):
        train(tiny(tmp_path, data, steps=3))
    shutil.copy(tmp_path / "model.safetensors", path)
    with pytest.raises(ValueError, match=r"state\.safetensors is no training state"):
        train(tiny(tmp_path, data, steps=3))


def test_a_training_state_is_no_model(tmp_path, data):
    train(tiny(tmp_path, data, steps=1))
    with pytest.raises(CheckpointError, match="training state"):
        ft.load(tmp_path / "state.safetensors", device="cpu")


class Killed(BaseException):
    pass


def killed_at(rename: int, when: str, settings: Train) -> bool:
    """Train until just before or just after a file takes its name for the `rename`th time ->
    whether it came to that.
    """
    original, count = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == rename and when == "before":
            raise Killed
        original(source, target)
        if count == rename:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        try:
            train(settings)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_between_any_two_files_loses_nothing(tmp_path, data, when):
    """Log, state and model are three files: wherever among them the end comes, the next start makes
    all three right.
    """
    train(tiny(tmp_path / "undisturbed", data))
    for rename in itertools.count(1):
        settings = tiny(tmp_path / str(rename), data)
        if not killed_at(rename, when, settings):
            break
        train(settings)
        assert same_bits(contents(tmp_path / "undisturbed"), contents(settings.out)), rename
        assert learnt(tmp_path / "undisturbed") == learnt(settings.out), rename
    assert (
        rename == 1 + 1 + 3 * 2
    )  # none is left after the log's start and three times state and model


def test_kills_at_any_time_lose_nothing(tmp_path, data):
    """kill -9 of a real process, three times, at random moments after it has begun to learn."""
    script = tmp_path / "run.py"
    settings = {**TINY, "data": data, "steps": 300, "save_every": 7}
    script.write_text(f"""
import sys, torch
from pathlib import Path
from flowturbo.training.train import Train, train
torch.set_num_threads(1)
train(Train(out=Path(sys.argv[1]), **{settings!r}))
""")
    train(tiny(tmp_path / "undisturbed", data, steps=300, save_every=7))
    out, rng = tmp_path / "killed", random.Random(1)
    log = out / "log.jsonl"

    def lines() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    kills = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, str(script), str(out)], env=ENVIRONMENT, stderr=subprocess.PIPE
        )
        goal = lines() + rng.randint(1, 40)
        while process.poll() is None and lines() < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        process.kill()
        stderr = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), (
            stderr.decode()
        )  # 0: this machine slept while the run came to its end
        kills += process.returncode != 0
        for name in ("model", "state"):  # whole or absent, at any moment
            path = out / f"{name}.safetensors"
            assert not path.exists() or load_tensors(path)
    assert kills
    done = subprocess.run(
        [sys.executable, str(script), str(out)], env=ENVIRONMENT, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    assert same_bits(contents(tmp_path / "undisturbed"), contents(out))
    assert learnt(out) == learnt(tmp_path / "undisturbed")
    assert [line["step"] for line in log_of(out)] == list(range(1, 301))


def test_a_cut_last_line_of_the_log_is_made_again(tmp_path, data):
    train(tiny(tmp_path / "a", data))
    train(tiny(tmp_path / "b", data, steps=5))
    with open(tmp_path / "b" / "log.jsonl", "a") as log:
        log.write(
            '{"step": 6, "loss": 1.0, "grad_norm": 1.0, "lr": 0.001, "seconds_per_step": '
            '1.0}\n{"step": 7, "lo'
        )
    train(tiny(tmp_path / "b", data))
    assert learnt(tmp_path / "a") == learnt(tmp_path / "b")


# The refiner.


def tiny_refiner(out: Path, data: str, teacher: Path, **changes: Any) -> Distill:
    kept = {k: v for k, v in TINY.items() if k not in ("model", "hidden", "patch")}
    return Distill(out=out, data=data, teacher=str(teacher), **{**kept, "lr": 3e-3, **changes})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data) -> Path:
    return train(
        tiny(
            tmp_path_factory.mktemp("teacher"),
            data,
            steps=150,
            hidden=32,
            depth=3,
            batch_size=16,
            lr=5e-3,
            save_every=150,
        )
    )


def test_a_refiner_from_end_to_end(tmp_path, data, teacher):
    path = distill(tiny_refiner(tmp_path, data, teacher, steps=150, batch_size=16, save_every=150))
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert np.mean(losses[-30:]) < 0.8 * np.mean(losses[:10])
    model = ft.load(teacher, path, device="cpu")
    config, refiner = model.predictor.config, model.refiner.config
    assert (refiner.depth, refiner.reads_velocity) == (1, True)
    assert (refiner.hidden, refiner.heads, refiner.patch, refiner.side) == (
        config.hidden,
        config.heads,
        config.patch,
        config.side,
    )
    for plan in ("H1P1R1", "H1P5R3", "E1S2"):
        assert ft.sample(model, plan, labels=[0, 2], guidance=2.0, seed=1).isfinite().all()
    fresh = ft.sample(model, "H1P1R1", labels=[0], seed=1)
    model.refiner.final_layer.linear.weight.zero_()
    model.refiner.final_layer.linear.bias.zero_()
    assert not torch.equal(ft.sample(model, "H1P1R1", labels=[0], seed=1), fresh)
    described = load_sit(path, "refiner").provenance
    assert described["steps"] == 150
    assert described["settings"]["teacher"] == teacher.name  # of paths only the name is kept


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(inside=True, delta_per_row=True, drop_before=True, delta_max=0.3),
        dict(guidance=(1.0, 3.0)),
        dict(depth=2),
    ],
    ids=str,
)
def test_a_refiner_goes_on_too(tmp_path, data, teacher, options):
    before = teacher.read_bytes()
    distill(tiny_refiner(tmp_path / "one", data, teacher, **options))
    for steps in (3, 12):
        distill(tiny_refiner(tmp_path / "two", data, teacher, steps=steps, **options))
    assert same_bits(contents(tmp_path / "one"), contents(tmp_path / "two"))
    assert teacher.read_bytes() == before
    plain = tmp_path / "plain"
    distill(tiny_refiner(plain, data, teacher))
    assert same_bits(contents(plain), contents(tmp_path / "one")) == (not options)
    if options:
        with pytest.raises(ValueError, match=r" was .* and is now "):
            distill(tiny_refiner(plain, data, teacher, **options))


def test_a_teacher_that_does_not_fit_the_data(tmp_path, data, teacher):
    other = tmp_path / "other.npz"
    np.savez(other, latents=np.zeros((4, 2, 8, 8), np.float32), labels=np.zeros(4, int))
    with pytest.raises(
        ValueError, match=r"data has latents \(2, 8, 8\).* the teacher wants \(2, 4, 4\)"
    ):
        distill(tiny_refiner(tmp_path / "a", str(other), teacher))
    np.savez(other, latents=np.zeros((4, 2, 4, 4), np.float32), labels=np.array([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"4 classes, the teacher wants .* of 3"):
        distill(tiny_refiner(tmp_path / "a", str(other), teacher))
    with pytest.raises(CheckpointError, match="gone"):
        distill(tiny_refiner(tmp_path / "a", data, tmp_path / "gone.pt"))
    refiner = distill(tiny_refiner(tmp_path / "r", data, teacher, steps=1))
    with pytest.raises(CheckpointError, match="is a refiner"):
        distill(tiny_refiner(tmp_path / "a", data, refiner))


# Several processes.


def test_two_processes_learn_what_one_does(tmp_path, data, teacher):
    """Under torchrun, with gloo. Not to the last bit, since sums over the batch round in another
    order, and AdamW makes a step of size lr of any gradient, however small: measured after 12
    steps, 5e-6 for the keys' bias, whose true gradient is zero, and 4e-7 for all else."""
    script = tmp_path / "run.py"
    common = {k: v for k, v in TINY.items() if k not in ("model", "hidden", "patch")}
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(4)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    script.write_text(f"""
import os, torch
from pathlib import Path
from flowturbo.training.train import Distill, Train, distill, train
torch.set_num_threads(1)
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
alone(distill, Distill(out=here / "two-refiner", data=data, teacher={str(teacher)!r}, **{common!r}))
try:
    alone(train, Train(out=here / "odd", data=data, **dict(settings, batch_size=5)))
except ValueError as error:
    (here / ("refused by " + os.environ["RANK"])).write_text(str(error))
""")
    train(tiny(tmp_path / "resumed by two", data, steps=5))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    train(tiny(tmp_path / "one", data))
    distill(Distill(out=tmp_path / "one-refiner", data=data, teacher=str(teacher), **common))
    for one, two in (("one", "two"), ("one", "resumed by two"), ("one-refiner", "two-refiner")):
        assert agree(contents(tmp_path / one), contents(tmp_path / two))
        for a, b in zip(learnt(tmp_path / one), learnt(tmp_path / two), strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    for rank in (0, 1):
        assert (
            "batch_size must be a multiple of the 2 processes, got 5"
            in (tmp_path / f"refused by {rank}").read_text()
        )
    assert not (tmp_path / "odd" / "model.safetensors").exists()


def agree(a: dict[str, Tensor], b: dict[str, Tensor], bound: float = 1e-4) -> bool:
    """Each tensor to `bound`, relative."""
    return a.keys() == b.keys() and all(relative_error(b[name], a[name]) <= bound for name in a)


# Settings that make no sense.


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
    "change",
    [
        *(
            {"delta_max": 0.0},
            {"delta_max": 1.0},
            {"delta_max": math.nan},
            {"guidance": (0.5, 2.0)},
            {"guidance": (3.0, 2.0)},
        ),
        *({"guidance": (1.0, math.inf)}, {"batch_size": 0}, {"depth": 0}),
    ],
    ids=str,
)
def test_settings_of_a_refiner_that_make_no_sense_are_refused(tmp_path, change, data, teacher):
    [name] = change
    with pytest.raises(ValueError, match=f"^{name} must be"):
        distill(tiny_refiner(tmp_path, data, teacher, **change))
    assert not list(tmp_path.iterdir())


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


def test_bf16_is_for_cuda(tmp_path, data):
    with pytest.raises(
        ValueError, match="precision 'bf16' is autocast on CUDA, but the device is cpu"
    ):
        train(tiny(tmp_path, data, precision="bf16"))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="device 'cuda' was asked for"):
        train(tiny(tmp_path, data, device="cuda"))


def test_a_run_that_explodes_says_so(tmp_path, data):
    """And saves no weights that are not finite."""
    with pytest.raises(FloatingPointError, match=r"the loss is .* at step .*lower lr"):
        train(tiny(tmp_path, data, lr=1e30, save_every=1, log_every=100, steps=50))
    assert all(v.isfinite().all() for v in contents(tmp_path).values())
