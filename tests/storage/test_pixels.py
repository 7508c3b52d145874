"""What numbers mean: arrays of any layout, and one scale for arrays and files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowturbo.storage.files import CheckpointError
from flowturbo.storage.images import read_image, read_mask, read_transparency, read_whole
from flowturbo.storage.pixels import kind_of, refuse_pixels, tensor_of, to_bytes, to_mask

VALUES = np.arange(24).reshape(2, 3, 4)


def readonly(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda a: a,
    "reversed": lambda a: np.ascontiguousarray(a[::-1, :, ::-1])[::-1, :, ::-1],
    "Fortran": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "broadcast": lambda a: np.broadcast_to(a, a.shape),
    "read-only": readonly,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "little-endian": lambda a: a.astype(a.dtype.newbyteorder("<")),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "field of a record": lambda a: np.array(
        [(v, 1) for v in a.ravel()], dtype=[("v", a.dtype), ("w", "i1")]
    )["v"].reshape(a.shape),
}  # fmt: skip
KINDS = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", [*KINDS, "longdouble"])
def test_arrays_of_any_layout_are_their_values(
    layout: Callable[[np.ndarray], np.ndarray], kind: str
) -> None:
    array = layout(VALUES.astype(kind))
    tensor = tensor_of("a", array)
    assert tensor.tolist() == VALUES.astype(kind).tolist()
    assert tensor.amax() == (1 if kind == "bool" else 23)  # torch computes with it
    tensor += tensor  # and writes into it, without changing what is read-only
    assert kind_of(array) == np.dtype(kind).name


def test_a_scalar_and_an_empty_array_keep_their_shape(tmp_path: Path) -> None:
    assert tensor_of("a", np.array(7, ">u2")).tolist() == 7
    assert tensor_of("a", np.zeros((0, 3), ">f8")).shape == (0, 3)
    np.save(tmp_path / "a.npy", VALUES.astype(np.float32))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert tensor_of("a", mapped).tolist() == VALUES.tolist()


@pytest.mark.parametrize(
    "values, kind, said",
    [
        (np.array([1, "a"], dtype=object), TypeError, "real numbers, got an array of object"),
        (np.array(["a"]), TypeError, "a must hold real numbers, got an array of <U1"),
        (np.zeros(3, np.complex64), TypeError, "real numbers, got an array of complex64"),
        (np.zeros(3, "M8[s]"), TypeError, "real numbers, got an array of datetime64"),
        (np.zeros(3, [("x", "f4")]), TypeError, "real numbers, got an array of"),
        (np.ma.masked_array([1, 2], [0, 1]), TypeError, "got a masked one: fill it first"),
        (np.array([2**63], np.uint64), ValueError, "whole numbers below 2"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "real numbers, got torch.complex64"),
        (torch.zeros(3).to_sparse(), TypeError, "must be a dense tensor"),
        ([1, 2], TypeError, "a must be an array or a tensor, got list"),
        ("a.png", TypeError, "a must be an array or a tensor, got str"),
    ],
)
def test_what_holds_no_real_numbers_is_refused(values: object, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        tensor_of("a", values)


BYTES = np.random.default_rng(0).integers(0, 256, (5, 6, 7), dtype=np.uint8)
BYTES[0, 0] = 0, 1, 2, 127, 128, 254, 255
SCALED = {
    "uint8": BYTES,
    "uint16": BYTES.astype(np.uint16) * 257,
    "float 0..1": BYTES / 255,
    "float32 0..1": (BYTES / 255).astype(np.float32),
    "float 0..255": BYTES.astype(np.float64),
    "float16 0..255": BYTES.astype(np.float16),
    "bool": (BYTES > 127),
}


@pytest.mark.parametrize("name", SCALED)
def test_one_scale_for_pixels_and_masks(name: str) -> None:
    for values in (SCALED[name], torch.from_numpy(SCALED[name].copy())):
        got = to_bytes("a", tensor_of("a", values), kind_of(values))
        expected = np.where(BYTES > 127, 255, 0) if name == "bool" else BYTES
        assert got.dtype == torch.uint8
        assert np.array_equal(got.numpy(), expected)
        mask = to_mask("a", tensor_of("a", values), kind_of(values))
        assert np.array_equal(mask.numpy(), BYTES > 127)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_nought_and_one_are_of_any_type(kind: str) -> None:
    chosen = BYTES > 99
    for numbers in (chosen, chosen & False, chosen | True):
        array = numbers.astype(kind)
        mask = to_mask("a", tensor_of("a", array), kind_of(array))
        assert (mask.dtype, mask.tolist()) == (torch.bool, numbers.tolist())


@pytest.mark.parametrize(
    "values, kind, said",
    [
        (
            np.array([0, 1.02]),
            ValueError,
            "from 0 to 1, or from 0 to 255, got values from 0 to 1.0",
        ),
        (np.array([-0.1, 1]), ValueError, "got values from -0.1 to 1"),
        (np.array([-1.0, 1.0]), ValueError, "got values from -1 to 1"),
        (np.array([0, 256.0]), ValueError, "got values from 0 to 256"),
        (np.array([0, np.nan]), ValueError, "must be finite"),
        (np.array([0, np.inf]), ValueError, "must be finite"),
        (np.array([0, 255], np.uint16), ValueError, "no value above 255, which would be black"),
        (np.array([0, 3], np.int64), TypeError, "got int64, of which it is not known what is whi"),
        (np.array([0, 200], np.uint32), TypeError, "got uint32"),
        (np.array([-1, 1], np.int8), TypeError, "got int8"),
    ],
)
def test_values_of_no_scale_are_refused(values: np.ndarray, kind: type, said: str) -> None:
    for read in (to_bytes, to_mask):
        with pytest.raises(kind, match=said):
            read("a", tensor_of("a", values), kind_of(values))


def test_the_largest_value_of_the_whole_array_says_the_scale() -> None:
    dark = np.zeros((2, 4))
    dark[0, 0], dark[1, 3] = 1.0, 200.0
    assert to_bytes("a", tensor_of("a", dark), "float64").tolist()[0][0] == 1
    black = np.zeros((2, 4), np.uint16)
    assert to_bytes("a", tensor_of("a", black), "uint16").max() == 0


def saved(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)  # type: ignore[arg-type]
    return path


def test_files_have_the_scale_of_arrays(tmp_path: Path) -> None:
    grey = BYTES[0]
    for k, array in enumerate((SCALED["uint8"][0], SCALED["uint16"][0], SCALED["bool"][0])):
        path = saved(tmp_path / f"{k}.png", array)
        expected = to_bytes("a", tensor_of("a", array), kind_of(array)).numpy()
        for read in (read_whole([path])[0], read_image(path, 6)):
            width = (7 - read.shape[1]) // 2
            assert np.array_equal(read[..., 0], expected[:, width : width + read.shape[1]])
        square = saved(tmp_path / f"m{k}.png", array[:, :6])
        assert np.array_equal(read_mask(square, 6, square), grey[:, :6] > 127)
    for kind in (np.uint8, np.uint16):  # 0 and 1, as labels are stored
        path = saved(tmp_path / "labels.png", (grey > 99).astype(kind)[:, :6])
        assert np.array_equal(read_mask(path, 6, tmp_path / "m0.png"), grey[:, :6] > 99)
    colour = np.repeat((grey > 99).astype(np.uint8)[:, :6, None], 3, axis=2)
    path = saved(tmp_path / "colour.png", colour)
    assert np.array_equal(read_mask(path, 6, path), grey[:, :6] > 99)


def test_a_mask_of_16_bits_is_cut_at_half_of_white(tmp_path: Path) -> None:
    levels = np.full((6, 6), 65535, np.uint16)
    levels[0] = 0, 256, 300, 32767, 32768, 65535
    path = saved(tmp_path / "m.png", levels)
    assert read_mask(path, 6, path)[0].tolist() == [False] * 4 + [True] * 2
    assert to_mask("a", tensor_of("a", levels), "uint16")[0].tolist() == [False] * 4 + [True] * 2


def test_16_bits_that_would_be_black_are_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "dark.png", np.full((6, 6), 200, np.uint16))
    for read in (lambda: read_image(path, 6), lambda: read_whole([path]),
                 lambda: read_mask(path, 6, path), lambda: read_transparency(path, 6)):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"dark\.png .*16 bits.* no value above 200"):
            read()
    black = saved(tmp_path / "black.png", np.zeros((6, 6), np.uint16))
    assert read_image(black, 6).max() == 0
    one = saved(tmp_path / "one.png", np.eye(6, dtype=np.uint16))
    with pytest.raises(CheckpointError, match=r"one\.png .* no value above 1,"):
        read_image(one, 6)


def png(path: Path, bits: bytes, *chunks: tuple[bytes, bytes], side: int = 2) -> Path:
    """A grey PNG of 16 bits."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)), *chunks]
    rows = [b"\0" + bits[2 * side * k : 2 * side * (k + 1)] for k in range(side)]
    parts += [(b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in parts:
        data += (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
    path.write_bytes(data)
    return path


def test_a_transparent_grey_of_16_bits_is_seen(tmp_path: Path) -> None:
    """Its key is compared with all 16 bits."""
    bits = struct.pack(">HHHH", 0x0700, 0x0701, 0xC800, 0x0700)
    path = png(tmp_path / "key.png", bits, (b"tRNS", struct.pack(">H", 0x0700)))
    assert read_image(path, 2)[..., 0].tolist() == [[255, 7], [200, 255]]
    transparent = read_transparency(path, 2)
    assert transparent is not None
    assert transparent.tolist() == [[True, False], [False, True]]
    assert read_mask(path, 2, path).tolist() == [[True, False], [False, True]]


def test_pixels_are_told_from_latents_by_their_sign() -> None:
    pixels = torch.from_numpy(BYTES[:4, :4, :4].copy())
    for values in (pixels.float(), pixels / 255, pixels.half(), pixels.double() / 16):
        with pytest.raises(ValueError, match=r"a must have values of both signs, got 64 from .* b"):
            refuse_pixels("a", values, "b")
    for values in (pixels / 127.5 - 1, torch.zeros(64), torch.ones(99), -torch.rand(64),
                   torch.rand(63), torch.randn(64)):  # fmt: skip
        refuse_pixels("a", values, "b")
