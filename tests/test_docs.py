"""The commands in the documents are commands: each is read as it stands, and those for text-to-image models run on small ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from flowturbo.cli import main, parse

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.md")])


def commands(text: str) -> list[list[str]]:
    """The words of every flowturbo command in the bash blocks, after the name; torchrun's with `-m flowturbo` too."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            if "flowturbo" in words:
                found.append(words[words.index("flowturbo") + 1 :])
    return found


def test_commands_are_found_in_every_form():
    bash = "```bash\npip install . && flowturbo info\ntorchrun -m flowturbo train --a \\\n  1  # why\nls\n```\n"
    text = bash + "```python\nflowturbo x\n```\n"
    assert commands(text) == [["info"], ["train", "--a", "1"]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_can_be_read(document):
    for words in commands(document.read_text()):
        try:
            parse(words)
        except SystemExit as refusal:
            pytest.fail(f"flowturbo {shlex.join(words)} is refused ({refusal})")


def test_the_readme_has_commands():
    assert len(commands((ROOT / "README.md").read_text())) > 20


NAMES = {
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
    "XCLiu/2_rectified_flow_from_sd_1_5": "2rf",
}
SMALLER = {"1024": "32", "512": "32", "10000": "2"}
"""Sizes in pixels, and steps of a training."""


def test_the_commands_for_text_to_image_run_on_small_models_in_the_same_folders(tmp_path, monkeypatch, pipeline_folders):
    monkeypatch.chdir(tmp_path)
    Path("captioned").mkdir()
    Image.effect_noise((40, 36), 80).convert("RGB").save("captioned/a.png")
    Path("captioned/a.txt").write_text("noise")
    section = re.search(r"^## Text to image\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    found = commands(section[1])
    assert {words[0] for words in found} == {"sample", "edit", "inpaint", "encode", "distill"}
    for words in found:
        chosen = [str(pipeline_folders[NAMES[word]]) if word in NAMES else SMALLER.get(word, word) for word in words]
        assert main([*chosen, "--device", "cpu"]) == 0, shlex.join(words)
    for name in ("fox.png", "samples.png", "edited.png", "inpainted.png"):
        with Image.open(name) as picture:
            assert min(picture.size) >= 32
