"""The commands in the documents are commands: each is read as it stands, and those for text-to-image models run on small ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from flowturbo.cli import parse

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
