"""Editing and inpainting from the command line, in .npz and image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowturbo.cli.main import main
from flowturbo.storage.files import CheckpointError
from flowturbo.storage.images import box_mask, read_mask, read_npz, read_transparency


def test_the_command_edits_and_inpaints_an_npz(tmp_path, capsys):
    assert (
        main(
            [
                "sample",
                "--model",
                "digits",
                "--num",
                "3",
                "--plan",
                "H1P1R1",
                "--out",
                str(tmp_path / "d.npz"),
            ]
        )
        == 0
    )
    common = [str(tmp_path / "d.npz"), "--model", "digits", "--plan", "H1R1"]
    assert (
        main(
            [
                "edit",
                *common,
                "--labels",
                "8",
                "--strength",
                "0.3",
                "--out",
                str(tmp_path / "e.npz"),
            ]
        )
        == 0
    )
    with np.load(tmp_path / "e.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 3)
        assert arrays["labels"].tolist() == [8, 8, 8]
    arguments = [
        "--labels",
        "1",
        "2",
        "3",
        "--box",
        "0.5",
        "0",
        "1",
        "1",
        "--out",
        str(tmp_path / "i.png"),
    ]
    assert main(["inpaint", *common, *arguments]) == 0
    assert Image.open(tmp_path / "i.png").width > 3 * 96
    before = read_npz(tmp_path / "d.npz")
    assert main(["inpaint", *common, *arguments[:-1], str(tmp_path / "i.npz")]) == 0
    after = read_npz(tmp_path / "i.npz")
    assert np.array_equal(after[:, :, :4], before[:, :, :4])
    assert not np.array_equal(after[:, :, 4:], before[:, :, 4:])
    assert main(["edit", str(tmp_path / "d.npz")]) == 2
    assert "images and labels (or prompts) must name at least one each" in capsys.readouterr().err


def inpaint(image: Path, *words: object) -> int:
    return main(["inpaint", str(image), "--model", "digits", "--labels", "3", *map(str, words)])


def test_the_command_takes_image_files_of_any_size_and_masks_of_theirs(tmp_path, capsys):
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    )
    picture.save(tmp_path / "a.png")
    mask = Image.new("L", (40, 30))
    mask.paste(255, (0, 0, 20, 30))
    mask.save(tmp_path / "m.png")
    out = tmp_path / "o.npz"
    options = ("--plan", "H1", "--out", out)
    assert inpaint(tmp_path / "a.png", "--mask", tmp_path / "m.png", *options) == 0
    assert read_npz(out).shape == (1, 8, 8, 3)
    Image.new("L", (41, 30), 255).save(tmp_path / "wrong.png")
    assert inpaint(tmp_path / "a.png", "--mask", tmp_path / "wrong.png") == 2
    assert "must have the size of" in capsys.readouterr().err
    assert inpaint(tmp_path / "a.png") == 2
    assert "mask or box must be given" in capsys.readouterr().err
    clear = picture.convert("RGBA")
    clear.paste((0, 0, 0, 0), (20, 0, 40, 30))
    clear.save(tmp_path / "clear.png")
    assert inpaint(tmp_path / "clear.png", *options) == 0
    assert not (tmp_path / "inpainted.png").exists()


def test_masks_are_cropped_as_their_images_are(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    mask = Image.new("L", (40, 20))
    mask.paste(255, (20, 0, 40, 20))
    mask.save(tmp_path / "m.png")
    cropped = read_mask(tmp_path / "m.png", 10, tmp_path / "a.png")
    assert not cropped[:, :4].any()
    assert cropped[:, 6:].all()
    clear = Image.new("RGBA", (40, 20), (9, 9, 9, 255))
    clear.paste((9, 9, 9, 0), (20, 0, 40, 20))
    clear.save(tmp_path / "c.png")
    assert np.array_equal(read_transparency(tmp_path / "c.png", 10), cropped)
    assert np.array_equal(read_mask(tmp_path / "c.png", 10, tmp_path / "a.png"), cropped)
    assert read_transparency(tmp_path / "a.png", 10) is None


def test_boxes_are_shares_of_the_image():
    assert box_mask((0.5, 0, 1, 1), 4, 4).tolist() == [[False, False, True, True]] * 4
    assert box_mask((0, 0.25, 0.3, 0.5), 4, 4).sum() == 1
    for box in ((0.5, 0, 0.5, 1), (0, 0, 2, 1), (0, 0.8, 1, 0.2)):
        with pytest.raises(ValueError, match="box must be left, top, right, bottom"):
            box_mask(box, 4, 4)


def test_files_that_hold_no_images_are_named(tmp_path):
    np.savez(tmp_path / "bad.npz", arr_0=np.zeros((2, 3)))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    for name in ("bad.npz", "torn.npz", "none.npz"):
        with pytest.raises(CheckpointError, match=name):
            read_npz(tmp_path / name)
