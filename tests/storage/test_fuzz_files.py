"""Files of arrays and images with changed bytes: a result or the library's errors, no more."""

import functools
import zipfile
from io import BytesIO

import numpy as np
import pytest
from fuzzing import CHANGES, LONG, SHORT, changed, refusal, rezipped, watched
from hypothesis import given
from PIL import Image

from flowturbo.data.encode import _NpzImages
from flowturbo.data.latents import load_data
from flowturbo.evaluation.image_sets import Reference
from flowturbo.evaluation.npz_images import StoredImages, digest_of_arrays
from flowturbo.storage.files import CheckpointError, load_arrays, open_npz, save_arrays
from flowturbo.storage.images import read_image, read_mask, read_npz, read_transparency

PIXELS = np.random.default_rng(1).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
COVARIANCE = np.eye(4) + 0.1


def npz(compressed=False, **arrays) -> bytes:
    file = BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def image(kind: str) -> bytes:
    file = BytesIO()
    mode = "RGBA" if kind == "PNG" else "RGB"
    Image.fromarray(PIXELS[0]).convert(mode).save(file, kind)
    return file.getvalue()


def reads_stored(path):
    stored = StoredImages(path)
    assert stored.shape[0] * stored.shape[1] <= 10 * path.stat().st_size
    if stored.stored:
        rows = stored.rows(0, stored.shape[0])
        assert rows.shape == stored.shape
    digest_of_arrays([path])


def reads_images(path):
    images = read_npz(path)
    assert images.dtype == np.uint8
    assert images.shape[3] == 3
    stored = _NpzImages(path)
    assert len(stored.labels) == len(stored.images) == len(stored.names)


def reads_statistics(path):
    reference = Reference(path)
    for gaussian in (reference.pool, reference.spatial):
        if gaussian is not None:
            assert gaussian.covariance.isfinite().all()
    assert reference.description["sha256"]


def reads_latents(path):
    data = load_data(path)
    assert len(data.shape) == 3


def reads_picture(path):
    assert read_image(path, 4).shape == (4, 4, 3)
    transparent = read_transparency(path, 4)
    assert transparent is None or transparent.dtype == bool
    assert read_mask(path, 4, path).shape == (4, 4)


def reads_any(path):
    with open_npz(path) as arrays:
        for name in list(arrays):
            assert isinstance(arrays[name], np.ndarray)


IMAGES = dict(arr_0=PIXELS, labels=np.arange(3))
STATISTICS = dict(mu=np.zeros(4), sigma=COVARIANCE, mu_s=np.ones(4), sigma_s=COVARIANCE)
LATENTS = dict(latents=np.zeros((3, 4, 2, 2), np.float32), labels=np.arange(3))
# name -> suffix, bytes, readers, the member whose header is changed
FILES = {
    "images": (".npz", npz(**IMAGES), (reads_images, reads_stored, reads_any), "arr_0.npy"),
    "compressed": (".npz", npz(True, **IMAGES), (reads_images, reads_stored), "arr_0.npy"),
    "labels": (".npz", npz(**IMAGES), (reads_images,), "labels.npy"),
    "statistics": (".npz", npz(**STATISTICS), (reads_statistics,), "sigma.npy"),
    "both": (".npz", npz(**STATISTICS, **IMAGES), (reads_statistics,), "mu.npy"),
    "latents": (".npz", npz(**LATENTS), (reads_latents, reads_any), "latents.npy"),
    **{
        kind: (f".{kind.lower()}", image(kind), (reads_picture,), None)
        for kind in ("PNG", "JPEG", "WEBP", "BMP")
    },
}


def check(tmp_path, suffix, data, readers):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    for reader in readers:
        message = refusal(ValueError, functools.partial(reader, path))  # a CheckpointError is one
        assert message is None or str(path) in message


def run(tmp_path, name, kind):
    suffix, data, readers, member = FILES[name]

    @kind
    @given(CHANGES)
    def bytes_changed(changes):
        check(tmp_path, suffix, changed(data, changes), readers)
        if member is not None:
            check(tmp_path, suffix, rezipped(data, member, changes), readers)

    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    for reader in readers:
        reader(path)
    bytes_changed()


@pytest.mark.parametrize("name", FILES)
def test_changed_bytes(tmp_path, name):
    run(tmp_path, name, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_at_length(tmp_path, name):
    run(tmp_path, name, LONG)


HUGE = (2**20, 2**20, 2**20, 3)


def with_header(shape, dtype="|u1", data=b"", packed=zipfile.ZIP_STORED) -> bytes:
    """An .npz whose array's header says this, and is followed by these bytes."""
    array, out = BytesIO(), BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(array, header)
    with zipfile.ZipFile(out, "w", packed) as archive:
        archive.writestr("arr_0.npy", array.getvalue() + data)
    return out.getvalue()


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("shape", [HUGE, (4, 2, 2, 3), (-1, 2, 2, 3), (1, -2, -2, 3)], ids=str)
def test_a_header_that_lies_costs_no_memory(tmp_path, shape, packed):
    path = tmp_path / "a.npz"
    path.write_bytes(with_header(shape, data=bytes(12), packed=packed))
    for reader in (read_npz, StoredImages, _NpzImages, reads_any):
        with watched(1 << 28), pytest.raises(CheckpointError, match=r"a\.npz"):
            reader(path)


def test_a_zip_that_lies_costs_no_memory(tmp_path):
    """Its directory says, as the array's header does, that a few bytes unpack to gigabytes."""
    shape = (2**30, 1, 1, 3)
    data = bytearray(with_header(shape, data=bytes(99), packed=zipfile.ZIP_DEFLATED))
    size = len(zipfile.ZipFile(BytesIO(bytes(data))).read("arr_0.npy"))
    at = data.rindex(b"PK\x01\x02") + 24
    assert int.from_bytes(data[at : at + 4], "little") == size
    data[at : at + 4] = (size - 99 + 3 * 2**30).to_bytes(4, "little")
    path = tmp_path / "a.npz"
    path.write_bytes(data)
    for reader in (read_npz, StoredImages, _NpzImages, reads_any):
        with watched(1 << 28), pytest.raises(CheckpointError, match=r"a\.npz"):
            reader(path)


def test_what_is_no_zip_of_arrays(tmp_path):
    path = tmp_path / "a.npz"
    plain, pickled, raw = BytesIO(), BytesIO(), BytesIO()
    np.save(plain, PIXELS)
    np.savez(pickled, arr_0=np.array([{}], dtype=object))
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("arr_0", b"raw bytes")
    for file, message in (
        (plain, "no zip file"),
        (pickled, "pickled objects"),
        (raw, "'arr_0', which is no array"),
    ):
        path.write_bytes(file.getvalue())
        for reader in (read_npz, _NpzImages, reads_any):
            with watched(), pytest.raises(CheckpointError, match=message):
                reader(path)


def test_arrays_of_ours_notice_any_change(tmp_path):
    path = tmp_path / "a.npz"
    save_arrays(path, IMAGES, {"kind": "x"})
    data = path.read_bytes()

    @SHORT
    @given(CHANGES)
    def run(changes):
        other = changed(data, changes)
        path.write_bytes(other)
        with watched():
            try:
                load_arrays(path)
            except CheckpointError:
                return
        assert other == data

    run()
