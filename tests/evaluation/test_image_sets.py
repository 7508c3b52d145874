"""Sets of images to be scored: right rows from any file, clear words for wrong ones, and the same
digest for the same arrays.
"""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import flowturbo as ft
from flowturbo.evaluation.image_sets import GeneratedImages, Reference, open_images
from flowturbo.solver.plan import Plan
from flowturbo.storage.files import CheckpointError

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 6, 5, 3), dtype=np.uint8)


def shards(folder, cuts=(8, 16), save=np.savez):
    folder.mkdir()
    parts = np.split(IMAGES, cuts)
    for k, part in enumerate(parts):
        save(
            folder / f"images-{k:05d}-of-{len(parts):05d}.npz",
            arr_0=part,
            labels=np.arange(len(part)),
        )
    return folder


def one_file(folder, save=np.savez):
    save(folder.with_suffix(".npz"), labels=np.arange(23), arr_0=IMAGES)
    return folder.with_suffix(".npz")


def pictures(folder):
    (folder / "b").mkdir(parents=True)
    for i, image in enumerate(IMAGES):  # numbered so that the order of names is that of images
        Image.fromarray(image).save(
            folder / ("b" if i > 11 else "") / f"{'x' if i > 11 else 'a'}{i:03d}.png"
        )
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


SOURCES = {
    "one .npz": one_file,
    "compressed": lambda folder: one_file(folder, np.savez_compressed),
    "in Fortran's order": lambda folder: one_file(
        folder, lambda path, **arrays: np.savez(path, arr_0=np.asfortranarray(arrays["arr_0"]))
    ),
    "shards": shards,
    "compressed shards": lambda folder: shards(folder, save=np.savez_compressed),
    "pictures": pictures,
}


@pytest.mark.parametrize("source", SOURCES)
def test_any_run_of_images_is_read(tmp_path, source):
    images = open_images(SOURCES[source](tmp_path / "set"), "samples")
    assert len(images) == 23
    for first, count in ((0, 23), (0, 1), (5, 9), (15, 2), (22, 1), (7, 1), (20, 9)):
        rows = images.read(first, count)
        assert rows.dtype == np.uint8
        assert np.array_equal(rows, IMAGES[first : first + count])
    assert images.description["images"] == 23
    assert images.description["size"] == [6, 5]


def test_a_plain_npz_is_never_held_whole(tmp_path, monkeypatch):
    images = open_images(one_file(tmp_path / "set"), "samples")

    def whole(*_):
        raise AssertionError("the whole file was read")

    monkeypatch.setattr(np, "load", whole)
    assert np.array_equal(images.read(3, 4), IMAGES[3:7])


def test_digests_follow_the_arrays_and_not_their_packing(tmp_path):
    def digest(path):
        return open_images(path, "samples").description["sha256"]

    plain = digest(one_file(tmp_path / "plain"))
    assert digest(one_file(tmp_path / "packed", np.savez_compressed)) == plain
    changed = IMAGES.copy()
    changed[22, 5, 4, 2] ^= 1
    np.savez(tmp_path / "changed.npz", labels=np.arange(23), arr_0=changed)
    assert digest(tmp_path / "changed.npz") != plain
    folder = pictures(tmp_path / "pictures")
    before = digest(folder)
    assert digest(folder) == before
    (folder / "b" / "x022.png").rename(folder / "b" / "x122.png")
    assert digest(folder) != before


def test_shards_must_be_a_whole_set(tmp_path):
    folder = shards(tmp_path / "set")
    (folder / "images-00001-of-00003.npz").unlink()
    with pytest.raises(CheckpointError, match="no whole set of 3 shards: shards 1 are missing"):
        open_images(folder, "samples")
    np.savez(folder / "images-00001-of-00004.npz", arr_0=IMAGES)
    with pytest.raises(CheckpointError, match="no whole set of 3 shards"):
        open_images(folder, "samples")


def test_a_manifest_is_told_without_its_files(tmp_path):
    folder = shards(tmp_path / "set")
    (folder / "manifest.json").write_text(
        json.dumps({"settings": {"plan": "H1P5R3"}, "shards": [{"name": "a"}]})
    )
    assert open_images(folder, "samples").description["manifest"] == {
        "settings": {"plan": "H1P5R3"}
    }
    (folder / "manifest.json").write_text("[")
    with pytest.raises(CheckpointError, match="no manifest"):
        _ = open_images(folder, "samples").description


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"images": IMAGES}, "has no arr_0"),
        ({"arr_0": IMAGES.astype(np.float32)}, "uint8 with N at least 1, got .* float32"),
        ({"arr_0": IMAGES[..., :1]}, r"got \(23, 6, 5, 1\)"),
        ({"arr_0": IMAGES[:0]}, r"got \(0, 6, 5, 3\)"),
    ],
)
def test_an_npz_of_anything_else_is_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(CheckpointError, match=said):
        open_images(tmp_path / "set.npz", "samples")


def test_what_is_no_set_of_images_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.npz does not exist"):
        open_images(tmp_path / "nowhere.npz", "samples")
    with pytest.raises(ValueError, match=r"samples must be an .npz or a folder .* does not exist"):
        open_images(tmp_path / "nowhere", "samples")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has neither"):
        open_images(tmp_path / "empty", "samples")
    mixed = pictures(tmp_path / "mixed")
    np.savez(mixed / "set.npz", arr_0=IMAGES)
    with pytest.raises(ValueError, match="mixed has both"):
        open_images(mixed, "samples")
    (tmp_path / "torn.npz").write_bytes(one_file(tmp_path / "set").read_bytes()[:900])
    with pytest.raises(CheckpointError, match=r"torn.npz is no whole .npz of images"):
        open_images(tmp_path / "torn.npz", "samples")


def test_images_of_several_sizes_are_refused(tmp_path):
    folder = pictures(tmp_path / "pictures")
    Image.fromarray(IMAGES[0, :4]).save(folder / "a003.png")
    with pytest.raises(
        ValueError, match=r"images must be of one size, but .*a003.png is of \(4, 5\)"
    ):
        open_images(folder, "samples").read(0, 5)
    np.savez(tmp_path / "pictures.npz", arr_0=IMAGES)
    folder = shards(tmp_path / "shards")
    np.savez(folder / "images-00002-of-00003.npz", arr_0=IMAGES[:, :4])
    with pytest.raises(CheckpointError, match=r"00002-of-00003.npz has images of"):
        open_images(folder, "samples")


def test_a_changed_byte_in_an_npz_is_found(tmp_path):
    path = one_file(tmp_path / "set")
    data = bytearray(path.read_bytes())
    at = data.index(IMAGES[9].tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        _ = open_images(path, "samples").description


@pytest.fixture(scope="module")
def digits():
    return ft.load("digits", device="cpu")


def test_made_images_are_those_of_sample_in_any_parts(digits):
    images = GeneratedImages(digits, Plan.parse("H1R1"), 23, 1.5, None, 3, 5)
    expected = ft.sample(
        digits,
        "H1R1",
        [i % 10 for i in range(23)],
        guidance=1.5,
        seed=3,
        batch_size=5,
        output="uint8",
    ).numpy()
    assert np.array_equal(images.read(0, 23), expected)
    assert np.array_equal(
        np.concatenate([images.read(first, 5) for first in range(0, 23, 5)]), expected
    )
    assert len(np.unique(expected)) > 100


def test_made_images_are_rounded_to_the_nearest_of_uint8(digits):
    images = GeneratedImages(digits, Plan.parse("E2"), 10, 1.0, None, 0, 10)
    latents = ft.sample(digits, "E2", range(10), seed=0, batch_size=10)
    exact = (latents.double().clamp(-1, 1) + 1) * 127.5
    error = torch.from_numpy(images.read(0, 10)[..., 0]).double() - exact[:, 0]
    assert error.abs().max() <= 0.5 + 1e-4
    assert error.mean().abs() < 0.1  # cutting off would give -0.5
    assert ((exact > 1) & (exact < 254)).double().mean() > 0.3


def gaussian(d: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(d) / d, np.eye(d) * 2


def test_a_reference_brings_its_own_gaussians_where_it_has_them(tmp_path):
    mu, sigma = gaussian(4)
    np.savez(
        tmp_path / "adm.npz", arr_0=IMAGES, mu=mu, sigma=sigma, mu_s=mu[:3], sigma_s=sigma[:3, :3]
    )
    np.savez(tmp_path / "plain.npz", arr_0=IMAGES)
    np.savez(tmp_path / "half.npz", arr_0=IMAGES, mu=mu, sigma=sigma)
    np.savez(tmp_path / "alone.npz", mu=mu, sigma=sigma)
    adm, plain, half, alone = (
        Reference(tmp_path / f"{name}.npz") for name in ("adm", "plain", "half", "alone")
    )
    assert adm.pool is not None
    assert adm.spatial is not None
    assert np.array_equal(adm.pool.mean, mu)
    assert np.array_equal(adm.spatial.covariance, sigma[:3, :3])
    assert len(adm.images) == 23
    assert adm.description["gaussians"] == "its own mu, sigma and mu_s, sigma_s"
    assert plain.pool is None
    assert plain.description["gaussians"] == "of its images"
    assert half.spatial is None
    assert half.description["gaussians"] == "its own mu, sigma"
    assert alone.images is None
    digests = {reference.description["sha256"] for reference in (adm, plain, half, alone)}
    assert len(digests) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"sigma": None},
        {"mu": None},
        {"sigma": np.eye(3)},
        {"mu": np.full(4, np.nan)},
        {"mu": np.array(["a"] * 4)},
    ],
)
def test_a_reference_with_half_a_gaussian_is_refused(tmp_path, change):
    mu, sigma = gaussian(4)
    arrays = {k: v for k, v in ({"mu": mu, "sigma": sigma} | change).items() if v is not None}
    np.savez(tmp_path / "ref.npz", arr_0=IMAGES, **arrays)
    with pytest.raises(CheckpointError, match=r"must hold mu \(D,\) and sigma \(D, D\)"):
        Reference(tmp_path / "ref.npz")


def test_a_reference_is_never_unpickled(tmp_path):
    with zipfile.ZipFile(tmp_path / "ref.npz", "w") as archive:
        archive.writestr("mu.npy", b"\x93NUMPY")
    np.savez(
        tmp_path / "object.npz", arr_0=IMAGES, mu=np.array([{}], dtype=object), sigma=np.eye(1)
    )
    for name in ("ref", "object"):
        with pytest.raises(CheckpointError, match=r"no whole .npz of plain arrays"):
            Reference(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sigma: np.triu(sigma), "sigma, but it is not symmetric"),
        (lambda sigma: sigma - 2 * sigma[0, 0] * np.eye(len(sigma)), "has negative eigenvalues"),
        (lambda sigma: -sigma, "has negative eigenvalues, down to -"),
    ],
)
def test_statistics_that_cannot_be_are_refused(tmp_path, change, message):
    rng = np.random.default_rng(3)
    features = rng.normal(size=(40, 6))
    sigma = np.cov(features.T)
    np.savez(tmp_path / "wrong.npz", mu=features.mean(0), sigma=change(sigma))
    with pytest.raises(CheckpointError, match=message):
        Reference(tmp_path / "wrong.npz")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_of_few_images_and_their_rounding_are_taken(tmp_path, dtype):
    """A singular covariance has eigenvalues of either sign within rounding."""
    features = np.random.default_rng(4).normal(size=(5, 40)).astype(dtype)
    sigma = np.cov(features.T, dtype=dtype)
    sigma[0, 1] *= 1 + np.finfo(np.float32).eps
    np.savez(tmp_path / "few.npz", mu=features.mean(0), sigma=sigma)
    pool = Reference(tmp_path / "few.npz").pool
    assert pool is not None
    assert pool.covariance.equal(pool.covariance.T)
