"""The benchmarks run, on whatever is here, and their tables read their reports; rivals are the same
network.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from close import assert_close
from paths import ROOT
from tiny import CONFIG, HEAD_DIM_72, random_sit

import flowturbo as ft
from flowturbo.models.sit import SIT_CONFIGS

sys.path.insert(0, str(ROOT / "bench"))

import harness
import operations
import rivals
import roofline
import subjects
import test_plans
from decoder import Autoencoder
from plain_sit import PlainSiT


def run(*command: str) -> str:
    # Small networks gain nothing from threads. In a worker of xdist no benchmark would be taken.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment = {**outside, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def benchmarked(report: Path, *arguments: str) -> list[dict]:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--benchmark-json={report}", *arguments)
    return json.loads(report.read_text())["benchmarks"]


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.slow
def test_kernel_benchmarks_run_and_are_tabled(tmp_path):
    report, page = tmp_path / "kernels.json", tmp_path / "RESULTS.md"
    entries = benchmarked(report, "bench/test_kernels.py")
    assert {"attention", "linear", "final_update"} <= {b["extra_info"]["op"] for b in entries}
    run("bench/table.py", str(report), "--out", str(page))
    found = rows(page.read_text())
    assert len(found) == 1 + len({b["group"] for b in entries})
    assert all(row.count("|") == found[0].count("|") for row in found)


@pytest.mark.slow
def test_plan_benchmarks_run_and_are_tabled(tmp_path):
    report, page = tmp_path / "plans.json", tmp_path / "RESULTS.md"
    arguments = "--rivals", "ours eager autocast", "--plans", "H2P4R2 H8", "--batches", "1 2"
    entries = benchmarked(report, "bench/test_plans.py", *arguments)
    assert len(entries) == 3 * 2 * 2 * 2
    for entry in entries:
        info = entry["extra_info"]
        assert 0 < info["floor"] < entry["stats"]["min"]
        assert info["first_seconds"] > 0
        assert (info["decode_seconds"] > 0) == info["decode"]
    run("bench/table.py", str(report), "--out", str(page))
    plans, paper = page.read_text().split("## The paper's comparisons")
    assert len(rows(plans)) == 1 + 8
    assert len(rows(paper)) == 1 + 4
    assert all(row.count("|") == rows(plans)[0].count("|") for row in rows(plans))


@pytest.mark.slow
def test_rivals_and_providers_that_are_none_are_refused():
    for suite, option in (("plans", "rivals"), ("kernels", "providers")):
        command = [
            sys.executable,
            "-m",
            "pytest",
            f"bench/test_{suite}.py",
            f"--{option}",
            "ours-fp9 eager",
            "--collect-only",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode
        assert re.search(
            rf"--{option} must be some of .*eager.*, got ours-fp9", done.stdout + done.stderr
        )


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path):
    run("bench/growth.py", str(tmp_path))
    curves = json.loads((tmp_path / "growth.json").read_text())["curves"]
    assert set(curves) == {"batch", "tokens", "H steps", "P steps", "R steps"}
    for points in curves.values():
        assert [p["at"] for p in points] == sorted({p["at"] for p in points})
        assert all(0 < p["limit_ms_an_image"] < p["ms_an_image"] for p in points)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_every_operation_has_a_group_of_its_own(monkeypatch, batch):
    """At the published sizes: what shares one overwrites another's row in the table."""
    monkeypatch.setattr(operations, "shapes", functools.partial(operations.shapes, published=True))
    operations.groups.cache_clear()
    groups = operations.groups(batch)
    operations.groups.cache_clear()
    assert len(groups) > 20
    assert len(set(groups)) == len(groups), [g for g in groups if groups.count(g) > 1]


def test_inputs_rotate_over_more_than_the_cache():
    """Also where a call reads little, and with the strides of the first."""
    rows = torch.randn(2, 6, 8)[:, 1]
    rotated = harness.rotated((rows, [rows]), 1 << 20, "cuda")
    assert len(rotated) * (1 << 20) >= harness.L2_BYTES > 2 * (60 << 20)
    assert len({args[0].data_ptr() for args in rotated}) == len(rotated)
    for args in rotated:
        assert args[0].stride() == rows.stride()
        assert args[0].equal(rows)
        assert args[1][0].data_ptr() == args[0].data_ptr()


def test_a_rival_is_given_up_before_the_next_is_made(monkeypatch):
    alive: set[str] = set()
    most = []

    class Model:
        def __init__(self, name: str) -> None:
            alive.add(name)
            most.append(len(alive))
            weakref.finalize(self, alive.discard, name)

    def rival(name):
        return lambda s: functools.partial(lambda model, plan: plan, Model(name))

    monkeypatch.setattr(test_plans, "_prepared", {})
    monkeypatch.setattr(
        test_plans, "RIVALS", {name: rival(name) for name in ("a", "b")} | {"c": rivals.plan_graph}
    )
    assert test_plans.prepared("a", 64, 1, False) is test_plans.prepared("a", 64, 1, False)
    for name, batch in (("b", 1), ("b", 2), ("a", 1)):
        test_plans.prepared(name, 64, batch, False)
    assert most == [1, 1, 1, 1]
    for _ in range(2):
        with pytest.raises(rivals.Unavailable, match="GPU"):
            test_plans.prepared("c", 64, 1, False)
    assert not alive


# The rivals' networks


@pytest.mark.parametrize("refiner", [False, True])
@pytest.mark.parametrize(
    "config", [CONFIG, HEAD_DIM_72, SIT_CONFIGS["SiT-S/8"]], ids=["24", "72", "S/8"]
)
def test_the_plain_network_is_ours(config, refiner):
    network = random_sit(config.refiner() if refiner else config, 3).double()
    x, v = torch.randn(2, 3, config.channels, config.side, config.side, dtype=torch.float64)
    t, y = torch.rand(3, dtype=torch.float64), torch.tensor([0, 4, config.num_classes])
    given = (x, t, y, v) if refiner else (x, t, y)
    plain = PlainSiT.of(network)
    assert plain.blocks[0].mlp.fc1.weight.data_ptr() == network.blocks[0].mlp.fc1.weight.data_ptr()
    assert_close(plain(*given), network(*given), 1e-6)  # its time features are float32


@pytest.mark.parametrize("rival", ["ours", "ours-eager", "eager"])
def test_rivals_sample_the_same_images(rival):
    s = subjects.subject(64, 2, False)
    reference = ft.load(
        s.predictor, s.refiner, device="cpu", dtype=torch.float32, backend="reference"
    )
    expected = ft.sample(reference, "H1P1R1", [0, 1], guidance=subjects.GUIDANCE, seed=0)
    assert_close(rivals.RIVALS[rival](s)("H1P1R1"), expected, 1e-5)


def test_a_rival_that_is_not_here_says_why(monkeypatch):
    with pytest.raises(rivals.Unavailable, match="GPU"):
        rivals.plan_graph(subjects.subject(64, 1, False))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(rivals.Unavailable, match="diffusers is not installed"):
        rivals.diffusers(subjects.subject(64, 1, False))


def test_the_plain_decoder_is_diffusers():
    diffusers = pytest.importorskip("diffusers")
    widths = (8, 16, 16)
    ours = Autoencoder(widths, 1, 4).double().eval()
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
    ).double()
    decoding = {
        k: v
        for k, v in theirs.state_dict().items()
        if k.startswith(("decoder.", "post_quant_conv."))
    }
    ours.load_state_dict(decoding)  # strict: the names are the same
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(ours.decode(z).sample, theirs.decode(z).sample, 1e-12)


# Limits


def test_the_limit_of_the_published_model_is_the_counted_one(monkeypatch):
    """SiT-XL/2 at 256 x 256, H1P5R3, batch 1, at 790 TFLOP/s and 4.3 TB/s, as counted by hand: 4.43
    ms, and 0.665 to decode.
    """
    monkeypatch.setattr(
        roofline, "ceilings", lambda device: {"copy": 4.3e12, "float32": 1e12, "bfloat16": 790e12}
    )
    xl = SIT_CONFIGS["SiT-XL/2"]
    limit = roofline.plan_floor(
        ft.Plan.parse("H1P5R3"), xl, xl.refiner(), 1, torch.bfloat16, "cuda"
    )
    assert limit == pytest.approx(4.43e-3, rel=0.01)
    vae = Autoencoder().bfloat16()
    assert roofline.decode_floor(vae, (1, 4, 32, 32), torch.bfloat16, "cuda") == pytest.approx(
        0.665e-3, rel=0.01
    )
