"""Texts of other people: any encoding that says what it is, and never the locale's."""

from __future__ import annotations

import ast
import codecs
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from PIL import Image

from flowturbo.cli.sample import Sample, read_prompts
from flowturbo.solver.plan import Plan
from flowturbo.storage.files import write_text
from flowturbo.storage.images import scan, scan_captions
from flowturbo.storage.text import TextError, decoded, read_lines

TEXT = "Höhle 猫 \u2028 \x85 \x0b 🦊"
MARKED = {
    "UTF-8": TEXT.encode(),
    "UTF-8 with a mark": codecs.BOM_UTF8 + TEXT.encode(),
    "UTF-16 LE": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "UTF-16 BE": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "UTF-32 LE": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "UTF-32 BE": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
}


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    return tmp_path


@pytest.mark.parametrize("data", MARKED.values(), ids=MARKED)
def test_a_text_is_the_same_in_every_encoding_that_says_its_name(
    captioned: Path, data: bytes
) -> None:
    assert decoded(data, "a") == TEXT
    (captioned / "1.txt").write_bytes(data)
    assert scan_captions(captioned).captions == [TEXT]
    assert read_prompts(captioned / "1.txt") == (TEXT,)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"one\ntwo \x92s", "line 2: byte 0x92 is not UTF-8"),
        (b"caf\xe9", "line 1: byte 0xe9 is not UTF-8"),
        (TEXT.encode("utf-16-le"), "line 1"),
        ("a fox".encode("utf-16-be"), "line 1: it holds NUL characters, as UTF-16 without a mark"),
        (codecs.BOM_UTF16_LE + b"a\0b", "is not UTF-16"),
        (codecs.BOM_UTF8 + b"\xff", "is not UTF-8"),
    ],
)
def test_other_bytes_are_refused_with_the_file_and_the_line(
    captioned: Path, data: bytes, said: str
) -> None:
    (captioned / "1.txt").write_bytes(data)
    with pytest.raises(TextError, match=rf"1\.txt can't be read as text, .*{said}"):
        scan_captions(captioned)
    with pytest.raises(ValueError, match=rf"prompts_file .*1\.txt can't be read as text.*{said}"):
        read_prompts(captioned / "1.txt")
    (captioned / "metadata.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=r"metadata\.jsonl"):
        scan_captions(captioned)


def test_lines_end_at_newlines_and_returns_alone(tmp_path: Path) -> None:
    inside = "a \x0b \x0c \x1c \x1d \x1e \x85 \u2028 \u2029 b"
    for ending in ("\n", "\r\n", "\r"):
        for last in ("", ending):
            path = tmp_path / "a.txt"
            path.write_bytes(f"one{ending}{inside}{ending}three{last}".encode())
            assert read_lines(path) == ["one", inside, "three"]
            assert read_prompts(path) == ("one", inside, "three")


@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8])
def test_json_lines_hold_any_character(captioned: Path, start: bytes) -> None:
    texts = [f"a{c}b" for c in "\u2028\u2029\x85\x0b\x1c\t猫"]
    rows = [json.dumps({"file_name": "1.png", "text": t}, ensure_ascii=k % 2 == 0) for k, t in
            enumerate(texts)]  # fmt: skip
    (captioned / "metadata.jsonl").write_bytes(start + "\r\n\n".join(rows).encode())
    assert scan_captions(captioned).captions == texts


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "1.png"}',
        '{"file_name": "1.png", "text": 3}',
        '{"file_name": "", "text": "a"}',
        '["1.png", "a"]',
        '{"file_name": "1.png", "text": "half a character: \\ud83e"}',
        "{'file_name': '1.png', 'text': 'a'}",
        "[" * 100_000,
    ],
)
def test_other_lines_are_refused_by_number(captioned: Path, line: str) -> None:
    good = '{"file_name": "1.png", "text": "a"}'
    (captioned / "metadata.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2, must be JSON with file_name"):
        scan_captions(captioned)


def test_a_name_that_is_no_text_does_not_cost_a_report(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_text(tmp_path / "report.md", f"of {name}\n")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "of caf\\udce9\n"


def test_a_plan_file_with_a_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan.parse("H1P2").save(path)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert Plan.load(path) == Plan.parse("H1P2")


WORDS = ["Höhle 猫", "a"]


def seen(folder: Path, words: list[str]) -> list[object]:
    """What is read of the folders, as values that a process can print."""
    images, table = scan(folder / "classes"), scan_captions(folder / "table")
    return [
        images.classes,
        images.names,
        images.read([0, 1], 8).tolist(),
        table.names,
        table.captions,
        table.read([0], 8).tolist(),
        scan_captions(folder / "captioned").captions,
        read_prompts(folder / "prompts.txt"),
        Sample(prompts=tuple(words), negative=words[0] if words else None).prompts,
    ]


def test_the_locale_decides_nothing(tmp_path: Path) -> None:
    """Names and texts under a locale without UTF-8 are those under UTF-8."""
    names = ("classes/Höhle/猫.png", "classes/a/b.png", "captioned/Höhle.png", "table/é.png")
    for shade, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / name)
    for name in ("captioned/Höhle.txt", "prompts.txt"):
        (tmp_path / name).write_text("Höhle 猫", encoding="utf-8")
    row = json.dumps({"file_name": "é.png", "text": "é"}, ensure_ascii=False)
    (tmp_path / "table" / "metadata.jsonl").write_text(row, encoding="utf-8")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers"), str(Path(__file__).parent)])
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": paths}
    code = "from test_texts import *; print(ascii(seen(Path(sys.argv[1]), sys.argv[2:])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *WORDS],
        env={**os.environ, **plain},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == seen(tmp_path, WORDS)
    assert seen(tmp_path, WORDS)[:2] == [["Höhle", "a"], ["Höhle/猫.png", "a/b.png"]]


def in_the_locale(path: Path) -> list[str]:
    """Calls that read or write text in the locale's encoding, by their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        keys = {keyword.arg: keyword.value for keyword in node.keywords}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if isinstance(node.func, ast.Name):
            name = f"{node.func.id}()"
        texts = name in ("read_text", "write_text") and "encoding" not in keys
        runs = "encoding" not in keys and ({"text", "universal_newlines"} & keys.keys())
        if name == "open()" or (name in ("open", "fdopen") and _opens_a_file(node)):
            first = 1 if name in ("open()", "fdopen") else 0
            mode = keys.get("mode", node.args[first] if len(node.args) > first else None)
            texts = "encoding" not in keys and "b" not in str(getattr(mode, "value", "r"))
        if texts or runs:
            found.append(f"{path.name}:{node.lineno}")
    return found


def _opens_a_file(node: ast.Call) -> bool:
    """Not an image, a member of an archive or a file's number."""
    owner = getattr(node.func, "value", None)
    others = ("Image", "archive", "os", "tarfile", "webbrowser")
    return node.func.attr == "fdopen" or getattr(owner, "id", "") not in others  # type: ignore[attr-defined]


def test_no_file_is_opened_in_the_locales_encoding(tmp_path: Path) -> None:
    folders = ("flowturbo", "flowturbo_kernels", "bench", "integrations", "tests/helpers")
    files = [ROOT / "setup.py", *(p for f in folders for p in sorted((ROOT / f).rglob("*.py")))]
    assert [line for path in files for line in in_the_locale(path)] == []
    for call in (
        "open('a')", "open('a', 'w')", "path.open('w')", "path.read_text()", "path.write_text('a')",
        "subprocess.run([], text=True)", "os.fdopen(3, 'w')", "open('a', mode='a')",
    ):  # fmt: skip
        (tmp_path / "a.py").write_text(call, encoding="utf-8")
        assert in_the_locale(tmp_path / "a.py") == ["a.py:1"], call
    for call in ("open('a', 'rb')", "Image.open('a')", "os.open('a', 1)", "open('a', encoding='x')",
                 "archive.open('a')"):  # fmt: skip
        (tmp_path / "a.py").write_text(call, encoding="utf-8")
        assert in_the_locale(tmp_path / "a.py") == [], call
