"""Encoding resumes to whole shards, and touches no others."""

from pathlib import Path

import pytest
import torch
from encoding import Halved, batches, equal, settings
from torch import Tensor

from flowturbo.data.encode import encode
from flowturbo.data.latents import ImageFolder, load_data
from flowturbo.storage.files import CheckpointError, save_tensors


class Killed(BaseException):
    pass


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_a_killed_run_leaves_whole_shards_and_goes_on(
    folder: Path, tmp_path: Path, halved: Halved, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    uninterrupted = encode(settings(folder, tmp_path / "uninterrupted"))
    out, calls = tmp_path / "out", 0
    plain = Halved.encode

    def dying(self: Halved, images: Tensor) -> tuple[Tensor, Tensor | None]:
        nonlocal calls
        calls += 1
        if calls == 4 * whole + 3:  # in the second batch of a shard
            raise Killed
        return plain(self, images)

    monkeypatch.setattr(Halved, "encode", dying)
    with pytest.raises(Killed):
        encode(settings(folder, out))
    monkeypatch.setattr(Halved, "encode", plain)
    left = {path.name: path.stat().st_ino for path in out.iterdir()}
    assert sorted(left) == [f"latents-0000{k}-of-00003.safetensors" for k in range(whole)]
    if whole:
        with pytest.raises(CheckpointError, match="missing"):
            load_data(out)
    # What a kill in the middle of a write leaves beside them.
    (out / ".latents-00002-of-00003.safetensors.x7.tmp").write_bytes(b"torn")
    encode(settings(folder, out))
    assert {
        path.name: path.stat().st_ino for path in out.iterdir() if path.name in left
    } == left  # kept, not made again
    assert equal(out, uninterrupted)


@pytest.mark.usefixtures("halved")
def test_the_same_images_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    runs = [encode(settings(folder, tmp_path / str(run))) for run in range(4)]
    for name in (path.name for path in runs[0].iterdir()):
        assert len({(run / name).read_bytes() for run in runs}) == 1


@pytest.mark.usefixtures("halved")
def test_damaged_shards_are_made_again_and_others_kept(folder: Path, tmp_path: Path) -> None:
    reference, out = (encode(settings(folder, tmp_path / name)) for name in ("reference", "out"))
    paths = sorted(out.iterdir())
    content = paths[1].read_bytes()
    before = [path.stat().st_ino for path in paths]
    for damaged in (content[:-1], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], b""):
        paths[1].write_bytes(damaged)
        encode(settings(folder, out))
        assert equal(out, reference)
    assert [path.stat().st_ino for path in paths[::2]] == before[::2]


@pytest.mark.usefixtures("halved")
def test_batch_size_and_place_may_change_between_runs(folder: Path, tmp_path: Path) -> None:
    out = encode(settings(folder, tmp_path / "out"))
    before = {path.name: path.stat().st_ino for path in out.iterdir()}
    (out / "latents-00001-of-00003.safetensors").unlink()
    moved = folder.rename(tmp_path / "moved")
    encode(settings(moved, out, batch_size=3))
    after = {path.name: path.stat().st_ino for path in out.iterdir()}
    assert after.keys() == before.keys()
    assert sum(after[name] == before[name] for name in after) >= 2
    assert torch.equal(batches(load_data(out), 11), batches(ImageFolder(moved, Halved(), 8), 11))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(vae="other"), "vae was 'any' and is now 'other'"),
        (dict(image_size=10), "image_size was 8 and is now 10"),
        (dict(flips=False), "flips was True and is now False"),
        (dict(dtype="float16"), "dtype was 'float32' and is now 'float16'"),
        (dict(shard_size=5), "shard_size was 4 and is now 5"),
        (dict(shard_size=6), "none of the 2 shards of these settings"),
    ],
)
@pytest.mark.usefixtures("halved")
def test_shards_of_other_settings_are_not_touched(
    folder: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    out = encode(settings(folder, tmp_path / "out"))
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=words) as caught:
        encode(settings(folder, out, **change))
    assert "choose another folder" in str(caught.value)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_shards_of_another_scale_other_classes_other_images_or_no_shards_are_not_touched(
    folder: Path, tmp_path: Path, halved: Halved
) -> None:
    out = encode(settings(folder, tmp_path / "out"))
    halved.scale = 1.5
    with pytest.raises(ValueError, match=r"scale was 0\.5 and is now 1\.5"):
        encode(settings(folder, out))
    halved.scale = 0.5
    (folder / "cat" / "0.png").rename(folder / "cat" / "00.png")
    with pytest.raises(
        ValueError, match=r"latents-00000-of-00003\.safetensors was made from other images"
    ):
        encode(settings(folder, out))
    (folder / "cat" / "00.png").rename(folder / "cat" / "0.png")
    encode(settings(folder, out))
    (folder / "dog").rename(folder / "hound")
    with pytest.raises(ValueError, match="classes was"):
        encode(settings(folder, out))
    (folder / "hound").rename(folder / "dog")
    save_tensors(
        out / "latents-00001-of-00003.safetensors", {"latents": torch.zeros(1)}, {"kind": "else"}
    )
    with pytest.raises(ValueError, match="was made by something else"):
        encode(settings(folder, out))
    other = tmp_path / "model"
    save_tensors(other / "model.safetensors", {"w": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"holds model\.safetensors, which is none of"):
        encode(settings(folder, other))


@pytest.mark.usefixtures("halved")
def test_a_bad_image_is_named_and_may_be_taken_out_without_losing_what_is_done(
    folder: Path, tmp_path: Path
) -> None:
    bad = folder / "dog" / "1.png"  # image 6, in the second shard
    bad.write_bytes(bad.read_bytes()[:60])
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"dog/1\.png"):
        encode(settings(folder, out))
    (first,) = out.iterdir()
    before = first.stat().st_ino
    bad.unlink()
    encode(settings(folder, out))
    assert first.stat().st_ino == before
    assert equal(out, encode(settings(folder, tmp_path / "reference")))
    assert len(load_data(out)) == 10
