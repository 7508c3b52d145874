"""What torch.compile is asked for: the best that it can, and nobody else is touched by it."""

from __future__ import annotations

import sys

import pytest
import torch
from paths import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / "bench"))

import inductor


def test_the_best_settings_are_those_of_one_compilation(monkeypatch):
    from torch._inductor import config

    before = config.get_config_copy()
    given = {}
    monkeypatch.setattr(
        torch, "compile", lambda network, **options: given.update(options) or network
    )
    for graphs in (True, False):
        compiled, said = inductor.best(graphs)
        compiled(nn.Identity())
        options = given["options"]
        assert options["triton.enable_persistent_tma_matmul"] is True
        assert options["triton.enable_pdl"] is False
        assert options["max_autotune"] is options["coordinate_descent_tuning"] is True
        assert options.get("triton.cudagraphs", False) is graphs
        assert "max_autotune_gemm_search_space" not in options
        assert (given["fullgraph"], given["dynamic"]) == (True, False)
        assert said == (
            f"max-autotune{'' if graphs else '-no-cudagraphs'}, "
            "triton.enable_persistent_tma_matmul=True, triton.enable_pdl=False"
        )
    assert config.get_config_copy() == before


def test_settings_that_this_torch_lacks_are_left_out_and_named(monkeypatch):
    given = {}
    monkeypatch.setattr(
        torch, "compile", lambda network, **options: given.update(options) or network
    )
    monkeypatch.setattr(
        inductor, "OPTIONS", {"triton.enable_pdl": True, "triton.enable_magic": True}
    )
    compiled, said = inductor.best(graphs=False)
    compiled(nn.Identity())
    assert "triton.enable_magic" not in given["options"]
    assert said.endswith(
        f"triton.enable_pdl=True, no triton.enable_magic in torch {torch.__version__}"
    )


@pytest.mark.parametrize("cutlass", [False, True])
def test_an_exhaustive_search_is_asked_for(cutlass, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(
        torch, "compile", lambda network, **options: given.update(options) or network
    )
    monkeypatch.setenv(inductor.EXHAUSTIVE, "1")
    monkeypatch.setattr(
        inductor, "no_cutlass", lambda: None if cutlass else "nvcc is not installed"
    )
    compiled, said = inductor.best(graphs=True)
    compiled(nn.Identity())
    assert given["options"]["max_autotune_gemm_search_space"] == "EXHAUSTIVE"
    assert given["options"].get("max_autotune_gemm_backends") == (
        "ATEN,TRITON,CUTLASS" if cutlass else None
    )
    assert ("no CUTLASS (nvcc is not installed)" in said) is not cutlass


def test_why_there_is_no_cutlass(monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setattr(inductor.shutil, "which", lambda name: None)
    assert inductor.no_cutlass() == "nvcc is not installed"
    monkeypatch.setattr(inductor.shutil, "which", lambda name: "/usr/bin/nvcc")
    place = getattr(config, "cutlass", None) or config.cuda
    with monkeypatch.context() as patch:
        patch.setattr(place, "cutlass_dir", str(tmp_path / "cutlass"))
        assert inductor.no_cutlass() == "no CUTLASS in cutlass"
        (tmp_path / "cutlass" / "python" / "cutlass_library").mkdir(parents=True)
        assert inductor.no_cutlass() is None
