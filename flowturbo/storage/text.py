"""Text files of other people: UTF-8 with or without a mark, UTF-16 and UTF-32 with one.

The locale's encoding is never used, so a file reads alike on every machine.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path

# UTF-32's mark begins as UTF-16's does, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


class TextError(ValueError):
    """A file that can't be read as text; the message names it, with the line."""


def decoded(data: bytes, name: object) -> str:
    """The text in a file's bytes, without its mark, its line ends as they are.

    name: of the file, for the TextError if the bytes are in no encoding that is read.
    """
    encoding = next((e for mark, e in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        title = encoding.removesuffix("-sig").upper()
        line = data[: error.start].count(b"\n") + 1
        raise TextError(
            f"{name} can't be read as text, line {line}: byte 0x{data[error.start]:02x} is not "
            f"{title} ({error.reason}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise TextError(
            f"{name} can't be read as text, line {line}: it holds NUL characters, as UTF-16 "
            "without a mark does; save the file as UTF-8"
        )
    return text


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file, as `decoded`. TextError, naming it, if it can't be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TextError(f"{path} can't be read as text: {error.strerror or error}") from None
    return decoded(data, path)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a file, without their ends.

    They end at newlines and carriage returns alone: U+0085, U+2028 and other characters at which
    `str.splitlines` splits stand inside of texts.
    """
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if len(lines) > 1 and not lines[-1] else lines


def file_name(name: str) -> str:
    """A name that the system gives, as text that is the same in every locale.

    Names are bytes. Python decodes them in the locale's encoding, so under another locale the same
    folder would be another class. Bytes that are no UTF-8 become lone surrogates.
    """
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def argument(text: str) -> str:
    """A word of the command line, which Python decodes in the locale's encoding, as UTF-8 if it is.

    Otherwise it is what the locale says.
    """
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def file_path(root: Path, name: str) -> Path:
    """The path under which the system finds a file by a name of `file_name`."""
    return root / os.fsdecode(name.encode("utf-8", "surrogateescape"))
