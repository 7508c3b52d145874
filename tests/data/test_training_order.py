"""The order of training: its definition, at a cost that does not grow with the data set."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import flowturbo.data.latents as module
from flowturbo.data.latents import order
from flowturbo.evaluation.image_sets import Shards, open_images
from flowturbo.evaluation.npz_images import StoredImages
from flowturbo.models.sit import SiT, SiTConfig
from flowturbo.runtime.rng import StepRandom
from flowturbo.training.objectives import FlowMatching
from flowturbo.training.trainer import Settings, Weights, run_training


@pytest.fixture
def shuffles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs that were shuffled, one entry a shuffle."""
    made: list[int] = []
    real = module.stream

    def counted(seed: int, number: int, lane: int = 0) -> np.random.Generator:
        made.append(number)
        return real(seed, number, lane=lane)

    monkeypatch.setattr(module, "stream", counted)
    module._permutation.cache_clear()
    return made


def by_definition(length: int, seed: int, position: int) -> int:
    bits = np.random.Philox(key=seed, counter=[0, 0, position // length, 2**62])
    return int(np.random.Generator(bits).permutation(length)[position % length])


@pytest.mark.parametrize("length", [1, 7, 64, 97])
def test_the_order_is_its_definition(length: int) -> None:
    for first, count in ((0, 9), (60, 40), (5 * length - 2, 4), (3, 3 * length), (10, 0)):
        expected = [by_definition(length, 5, p) for p in range(first, first + count)]
        assert order(length, 5, first, count).tolist() == expected


@pytest.mark.parametrize("world", [1, 4])
def test_an_epoch_is_shuffled_once(shuffles: list[int], world: int) -> None:
    length, batch = 10_007, 64
    share = batch // world
    for step in range(400):
        order(length, 3, step * batch + (world - 1) * share, share)
    assert shuffles == [0, 1, 2]


def test_a_step_holds_no_list_of_all_numbers(shuffles: list[int]) -> None:
    length = 3_000_000
    order(length, 0, 0, 256)
    tracemalloc.start()
    for step in range(1, 40):
        order(length, 0, step * 256, 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000  # of 24 MB that all numbers take
    assert shuffles == [0]


class Counting:
    """Data of which only the numbers are asked."""

    num_classes, shape = 2, (1, 4, 4)

    def __len__(self) -> int:
        return 50

    def batch(self, indices: np.ndarray, draws: StepRandom) -> tuple[Tensor, Tensor]:
        return draws.normal(self.shape), torch.from_numpy(indices) % 2


def test_a_training_shuffles_once_an_epoch(tmp_path: Path, shuffles: list[int]) -> None:
    config = SiTConfig(hidden=16, depth=1, heads=2, patch=2, side=4, channels=1, num_classes=2)
    settings = Settings(tmp_path, steps=30, batch_size=5)
    weights = Weights("a", lambda *_: None)
    cpu = torch.device("cpu")
    run_training(SiT(config), FlowMatching(2, 0.1), Counting(), settings, cpu, weights)
    assert shuffles == [0, 1, 2]


def test_a_read_of_an_image_set_asks_only_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a set of many files, for its evaluation."""
    images = np.random.default_rng(0).integers(0, 256, (40, 2, 2, 3), dtype=np.uint8)
    for k in range(20):
        np.savez(tmp_path / f"{k:02d}.npz", arr_0=images[2 * k : 2 * k + 2])
    shards = open_images(tmp_path, "samples")
    assert isinstance(shards, Shards)
    asked: list[str] = []
    real = StoredImages.rows

    def rows(self: StoredImages, first: int, count: int) -> np.ndarray:
        asked.append(self.path.name)
        return real(self, first, count)

    class Apart(list):  # type: ignore[type-arg]
        def __iter__(self) -> object:  # type: ignore[override]
            raise AssertionError("all files were gone through")

    monkeypatch.setattr(StoredImages, "rows", rows)
    shards.arrays = Apart(shards.arrays)
    for first, count in ((0, 40), (39, 1), (39, 9), (5, 4), (6, 2)):
        asked.clear()
        assert np.array_equal(shards.read(first, count), images[first : first + count])
        last = min(first + count, 40) - 1
        assert asked == [f"{k:02d}.npz" for k in range(first // 2, last // 2 + 1)]
