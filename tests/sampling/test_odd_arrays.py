"""Editing with the arrays that other programs make, and pixels where latents belong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from edits import GREY, LABELS, half, pictures, pixel_model
from tiny import tiny_model

import flowturbo as ft
from flowturbo.data.latents import Latents, load_data
from flowturbo.storage.files import CheckpointError, save_tensors

PICTURES = pictures().numpy().copy()
MASK = half().numpy()
REVERSED = np.ascontiguousarray(PICTURES[:, ::-1])[:, ::-1]


def edited(images: Any, **options: Any) -> torch.Tensor:
    return ft.edit(pixel_model(), "H1", images, LABELS, strength=0.5, seed=0, **options)


def inpainted(mask: Any, images: Any = PICTURES) -> torch.Tensor:
    return ft.inpaint(pixel_model(), "H1", images, mask, LABELS, seed=0)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "images",
    [
        REVERSED,
        np.asfortranarray(PICTURES),
        PICTURES.astype(np.uint16) * 257,
        PICTURES.astype(">u2") * 257,
        PICTURES / 255,
        (PICTURES / 255).astype(">f4"),
        PICTURES.astype(np.float32),
        PICTURES.astype(np.float64),
        torch.from_numpy(PICTURES.astype(np.uint16) * 257),
        torch.from_numpy(PICTURES).float() / 255,
        torch.from_numpy(PICTURES).half(),
        torch.from_numpy(PICTURES).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    ],
)
def test_images_of_every_layout_and_scale_are_the_same_images(images: Any) -> None:
    assert edited(images).equal(edited(PICTURES))
    outside = inpainted(MASK, images)[:, ~torch.from_numpy(MASK)]
    assert outside.equal(torch.from_numpy(PICTURES)[:, ~torch.from_numpy(MASK)])


def test_a_read_only_array_is_taken_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    fixed = PICTURES.copy()
    fixed.flags.writeable = False
    assert edited(fixed).equal(edited(PICTURES))
    assert not [w for w in recwarn if "writ" in str(w.message)]


@pytest.mark.parametrize(
    "mask",
    [
        MASK[:, ::-1][:, ::-1],
        np.asfortranarray(MASK),
        MASK.astype(int),
        MASK.astype(np.int8),
        MASK.astype(">u8"),
        MASK * np.uint16(65535),
        MASK * 1.0,
        MASK * 255.0,
        (MASK * 255).astype(">f4"),
        MASK * np.uint8(200),
        torch.from_numpy(MASK * np.uint16(65535)),
        np.broadcast_to(MASK, (3, 8, 8)),
    ],
)
def test_masks_of_every_layout_and_scale_are_the_same_mask(mask: Any) -> None:
    assert inpainted(mask).equal(inpainted(MASK))


@pytest.mark.parametrize(
    "mask, kind, said",
    [
        (MASK * 1.07, ValueError, "mask in floating point must be from 0 to 1, or from 0 to 255"),
        (MASK * 2.0 - 1, ValueError, "got values from -1 to 1"),
        (np.where(MASK, np.nan, 0), ValueError, "mask must be finite"),
        (MASK * 255, TypeError, "got int64, of which it is not known what is white"),
        (MASK.astype(np.uint16) * 255, ValueError, "mask has 16 bits"),
        (MASK.astype(object), TypeError, "mask must hold real numbers, got an array of object"),
        (MASK * 1j, TypeError, "mask must hold real numbers, got an array of complex128"),
        (np.float64(1), TypeError, "mask must be an array or a tensor, got float64"),
        (np.array(1.0), ValueError, r"got \(\)"),
        (MASK.tolist(), TypeError, "mask must be an array or a tensor, got list"),
        (np.ma.masked_array(MASK), TypeError, "got a masked one"),
    ],
)
def test_masks_without_a_clear_meaning_are_refused(mask: Any, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        inpainted(mask)


@pytest.mark.parametrize(
    "images, kind, said",
    [
        (PICTURES / 127.5 - 1, ValueError, "images in floating point must be from 0 to 1, or from"),
        (PICTURES / 200, ValueError, "got values from 0 to 1.2"),
        (PICTURES.astype(np.uint16), ValueError, "images has 16 bits"),
        (PICTURES.astype(np.int64), TypeError, "got int64, of which it is not known what is white"),
        (PICTURES.astype("U3"), TypeError, "images must hold real numbers, got an array of <U3"),
        (PICTURES.transpose(0, 3, 1, 2), ValueError, r"images must have shape \(N, height, width"),
        (np.array(3), ValueError, r"images must have shape .*, got int64 of \(\)"),
        (PICTURES[:, None, ..., 0].astype(np.float32), ValueError, "give pixels as"),
        (PICTURES[:, None, ..., 0] / 255, ValueError, "latents must have values of both signs"),
    ],
)
def test_images_without_a_clear_meaning_are_refused(images: Any, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        edited(images)


def test_pixels_are_no_noise() -> None:
    model = tiny_model(GREY)
    pixels = torch.from_numpy(PICTURES[:, None, ..., 0].copy())
    for noise in (pixels.float(), pixels / 255, torch.rand(3, 1, 8, 8)):
        with pytest.raises(ValueError, match="noise must have values of both signs"):
            ft.sample(model, "H1", LABELS, noise=noise)
    with pytest.raises(TypeError, match=r"noise must be floating point, got torch\.uint8"):
        ft.sample(model, "H1", LABELS, noise=pixels)
    with pytest.raises(ValueError, match="noise must have values of both signs"):
        edited(PICTURES, noise=torch.rand(3, 1, 8, 8))
    ft.sample(model, "H1", LABELS, noise=torch.zeros(3, 1, 8, 8))
    ft.sample(lambda x, t: x, "H1", noise=torch.rand(3, 1, 8, 8))  # a function of any kind


@pytest.mark.parametrize(
    "labels",
    [
        np.array(LABELS[::-1])[::-1],
        np.array(LABELS, ">i8"),
        *(np.array(LABELS, kind) for kind in ("u1", "u2", ">u2", "u4", "u8", "i1")),
        [np.uint64(n) for n in LABELS],
        tuple(np.uint16(n) for n in LABELS),
        torch.tensor(LABELS, dtype=torch.uint16),
    ],
)
def test_labels_are_whole_numbers_of_any_type(labels: Any) -> None:
    model = tiny_model()
    assert ft.sample(model, "H1", labels, seed=0).equal(ft.sample(model, "H1", LABELS, seed=0))


@pytest.mark.parametrize(
    "labels, kind, said",
    [
        (np.array(LABELS, float), TypeError, "labels must be whole numbers, got torch.float64"),
        (np.array(["1"]), TypeError, "labels must be a class number .* no names, got '1'"),
        (np.array([1, 2], dtype=object), TypeError, "got an array of object"),
        (np.array([2**63], np.uint64), ValueError, "labels must be whole numbers below 2"),
        ([np.uint64(2**63)], ValueError, "labels must be whole numbers below 2"),
        (np.array([True, False]), TypeError, "labels must be whole numbers, got torch.bool"),
        (np.array([[1]]), ValueError, r"got shape \(1, 1\)"),
        (np.array([], int), ValueError, r"got shape \(0,\)"),
        ({1, 2}, TypeError, "labels must be a class number or a list of them"),
    ],
)
def test_other_labels_are_refused_by_what_is_wrong(labels: Any, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        ft.sample(tiny_model(), "H1", labels, seed=0)


@pytest.mark.parametrize(
    "labels",
    [
        [3, 1, 4, 1, 5],
        (3, 1, 4, 1, 5),
        np.array([3, 1, 4, 1, 5]),
        np.array([5, 1, 4, 1, 3], ">i2")[::-1],
        torch.tensor([3, 1, 4, 1, 5]),
        range(3, 8),
    ],
)
def test_what_a_function_is_given_is_cut_into_its_batches(labels: Any) -> None:
    seen: list[list[int]] = []

    def v(x: torch.Tensor, t: torch.Tensor, labels: Any) -> torch.Tensor:
        seen.append([int(label) for label in labels])
        return x

    ft.sample(v, "E1", labels, noise=torch.randn(5, 2), batch_size=2)
    a, b, c, d, e = (int(label) for label in labels)
    assert seen == [[a, b], [c, d], [e, e]]


# Files of latents

GOOD = np.random.default_rng(0).standard_normal((9, 2, 4, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "latents, labels",
    [
        (GOOD.astype(">f4"), np.arange(9, dtype=">i4")),
        (np.asfortranarray(GOOD), np.arange(9)[::-1][::-1]),
        (GOOD.astype(np.float64), np.arange(9, dtype=np.uint16)),
        (GOOD, np.arange(9, dtype=np.uint64)),
        (GOOD, np.arange(9, dtype=">u4")),
    ],
)
def test_latents_of_an_npz_may_have_any_layout(tmp_path, latents, labels) -> None:
    np.savez(tmp_path / "a.npz", latents=latents, labels=labels)
    data = load_data(tmp_path / "a.npz")
    assert isinstance(data, Latents)
    assert data.mean.tolist() == GOOD.tolist()
    assert data.labels.tolist() == list(range(9))
    assert data.num_classes == 9
    assert data.batch(np.arange(9), None)[0].tolist() == GOOD.tolist()  # type: ignore[arg-type]


def test_latents_in_memory_may_have_unsigned_labels() -> None:
    labels = torch.arange(9).to(torch.uint32)
    assert Latents(torch.tensor(GOOD), labels).labels.tolist() == list(range(9))
    with pytest.raises(ValueError, match=r"latents must be floating point, got torch\.uint8"):
        Latents(torch.zeros(9, 2, 4, 4, dtype=torch.uint8), labels)
    with pytest.raises(TypeError, match="labels must hold real numbers"):
        Latents(torch.tensor(GOOD), torch.zeros(9, dtype=torch.complex64))


def test_a_shard_may_hold_unsigned_labels(tmp_path) -> None:
    labels = torch.arange(9).to(torch.uint16)
    for name, numbers in (("a", labels), ("b", labels.to(torch.int64))):
        tensors = {"latents": torch.tensor(GOOD), "labels": numbers}
        save_tensors(tmp_path / f"{name}.safetensors", tensors, {})
    data = load_data(tmp_path)
    assert (len(data), data.num_classes) == (18, 9)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"latents": np.abs(GOOD * 99)}, "latents must have values of both signs, .* as pixels"),
        ({"latents": np.abs(GOOD) / 9}, "latents must have values of both signs"),
        (
            {"latents": (GOOD * 9).astype(np.uint8)},
            "latents must be floating point, got torch.uint",
        ),
        ({"latents": (GOOD * 9).astype(np.int64)}, "pixels must be encoded first"),
        ({"latents": GOOD * 1j}, "latents must hold real numbers, got an array of complex64"),
        ({"latents_flipped": np.abs(GOOD)}, "latents_flipped must have values of both signs"),
        ({"std": -np.abs(GOOD)}, "std must not be negative, .* not its logarithm"),
        ({"labels": np.array(["a"] * 9)}, "labels must hold real numbers"),
        ({"labels": np.zeros(9, complex)}, "labels must hold real numbers"),
        ({"labels": np.full(9, 2**64 - 1, np.uint64)}, "labels must be whole numbers below"),
    ],
)
def test_files_of_pixels_and_other_numbers_are_refused(tmp_path, change, said) -> None:
    arrays = {"latents": GOOD, "labels": np.arange(9), **change}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CheckpointError, match=rf"a\.npz.*{said}"):
        load_data(tmp_path / "a.npz")
    if all(array.dtype.kind in "iuf" for array in arrays.values()):
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        save_tensors(tmp_path / "shards" / "a.safetensors", tensors, {})
        with pytest.raises(CheckpointError, match=rf"a\.safetensors.*{said}"):
            load_data(tmp_path / "shards")
