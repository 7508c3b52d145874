"""The comparison of dtypes on the CPU times the same things in both, in turn."""

import sys

import pytest
import torch
from paths import ROOT

from flowturbo.models.sit import SiTConfig

sys.path.insert(0, str(ROOT / "bench"))

from bfloat16_cpu import DTYPES, Line, in_turn, lines, main, parts

CONFIG = SiTConfig(hidden=48, depth=1, heads=2, patch=2, side=4)


def test_the_two_take_turns_and_the_least_counts():
    order = []
    line = in_turn("x", lambda: order.append("wide"), lambda: order.append("narrow"), 3)
    assert order == ["wide", "narrow"] * 4
    assert line.name == "x"
    assert min(line.float32, line.bfloat16, line.ratio) > 0
    assert str(Line("a", 2.0, 1.0, 0.75)) == "| a | 2.00 | 1.00 | 0.50 | 0.75 |"


def test_every_part_is_in_its_dtype():
    for dtype in DTYPES:
        for name, run in parts(CONFIG, 1, dtype):
            result = run()
            flat = result if isinstance(result, list) else [result]
            flat = [t for r in flat for t in (r if isinstance(r, tuple) else (r,))]
            assert {t.dtype for t in flat} == {dtype}, name


@pytest.mark.filterwarnings("ignore:this CPU has no bfloat16")
def test_the_table_names_the_machine_and_all_parts(monkeypatch, tmp_path):
    assert [line.name for line in lines(CONFIG, 1, 1)][:2] == ["whole call", "products"]
    out, threads = tmp_path / "table.md", str(torch.get_num_threads())
    words = "--models", "SiT-S/8", "--batches", "1", "--pairs", "1", "--threads", threads
    monkeypatch.setattr(sys, "argv", ["bfloat16_cpu.py", *words, "--out", str(out)])
    main()
    text = out.read_text()
    assert f"{threads} threads, torch {torch.__version__}" in text
    for name in ("whole call", "products", "attention", "GELU", "residual and adaLN"):
        assert f"SiT-S/8, 1 blocks, batch 1: {name}" in text
