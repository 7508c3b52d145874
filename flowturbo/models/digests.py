"""What the results of a model depend on, in one number for each of its files."""

from __future__ import annotations

import hashlib
import json
import os

from ..storage.files import MARK, CheckpointError, header_texts
from ..storage.provenance import file_digest
from .bundled import files_of

_NO_MATTER = ("plans", "guidance", "license", "provenance")
"""Parts of a description that change no velocity. Results name their plan and scale themselves."""


def model_digests(
    model: str | os.PathLike[str], refiner: str | os.PathLike[str] | None
) -> dict[str, str | None]:
    """Digests of the files of a model and its refiner.

    A bundled model brings its own refiner, if it has one.
    """
    predictor, refiner = files_of(model, refiner)
    return {
        "predictor_sha256": model_digest(predictor),
        "refiner_sha256": None if refiner is None else model_digest(refiner),
    }


def model_digest(path: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a model's file without its plans, guidance scale, licence and provenance.

    So an evaluation or a search resumes when the plans that it found were added to the file. Of a
    file that this project did not write, it is the SHA-256 of all bytes.
    """
    try:
        description = json.loads(header_texts(path)[MARK])
        kept = {key: value for key, value in description.items() if key not in _NO_MATTER}
    except (CheckpointError, KeyError, ValueError, AttributeError):
        return file_digest(path)
    hashed = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__")
        hashed.update(json.dumps(header, sort_keys=True).encode())
        while piece := file.read(1 << 22):
            hashed.update(piece)
    return hashed.hexdigest()
