"""Launches are held to the table in docs/launches.md."""

from __future__ import annotations

import pytest
import torch

import fake_cuda

if not fake_cuda.PRESENT:
    pytest.skip("needs the stand-in for a CUDA device", allow_module_level=True)

from fake_cuda.count_launches import PAGE, counts, of_our_own, table

CALL = 2 + 28 * 7
MOST = {
    "predictor call": CALL,
    "predictor call in fp8": CALL,
    "refiner call": 2 + 7,
    "H1P5R3": 1450,
    "decoding": 130,
}
"""Launches, at most, with the version of torch that the table names."""


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="the table is of an H100")
@pytest.mark.parametrize("batch", [1, 8])
def test_a_launch_more_or_less_changes_the_table(batch, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))
    found = counts(batch)
    written, counted = PAGE.read_text(), table(found)
    said = f"launches differ from {PAGE.name}; what they are now:\n{counted}"
    # Another version of torch may add launches of its own around its attention and reductions.
    assert sorted(of_our_own(counted)) == sorted(of_our_own(written)), said
    if torch.__version__.startswith("2.11."):
        assert counted in written, said
        assert {k: n for k, n in MOST.items() if found[k].total() > n} == {}
    # Nothing is only copied, cast, concatenated or updated.
    for kind in ("copies and casts", "concatenations", "SiLU"):
        assert not found["H1P5R3"][f"{kind} (torch)"]
    assert not found["H1P5R3"]["`_update_kernel`"]
