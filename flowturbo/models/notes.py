"""What a model's file says to those who use it: class names, plans, guidance, a licence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..checks import finite
from ..storage.files import CheckpointError
from .class_names import checked_names, unusable
from .model_plans import checked_plans

NOTES = ("class_names", "plans", "guidance", "license")


@dataclass(frozen=True)
class Notes:
    """Of a model's file.

    class_names: of all classes, by number, if it names them.
    plans: name -> what a plan's file holds.
    guidance: the scale that it recommends, if it does.
    license: under which the weights may be used, in a line, if it is named.
    """

    class_names: Sequence[str] | None = None
    plans: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    license: str | None = None

    @classmethod
    def read(cls, path: object, description: Mapping[str, Any], num_classes: int) -> Notes:
        """The notes in a file's description.

        num_classes: as the file is read. If that is not the file's own number, because another row
        was taken for the null class, there are no names.
        Raises CheckpointError for notes that no file may hold.
        """
        said = {name: description[name] for name in NOTES if description.get(name) is not None}
        if not said:
            return cls()
        config = description["config"]
        own, guidable = config["num_classes"], config.get("null_row", True)
        try:
            notes = cls(**cls(**said).checked(own, guidable))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        return notes if own == num_classes else replace(notes, class_names=None)

    def updated(self, other: Notes) -> Notes:
        """These notes, and those that the other has in place of them; plans name by name."""
        return Notes(
            self.class_names if other.class_names is None else other.class_names,
            {**self.plans, **other.plans},
            self.guidance if other.guidance is None else other.guidance,
            self.license if other.license is None else other.license,
        )

    def with_refiner(self, refiner: Notes) -> Notes:
        """Those of a predictor's file with those of its refiner's.

        Plans and a scale in the refiner's file were found with both, so they come first. All else
        is the predictor's.
        """
        return replace(self.updated(refiner), class_names=self.class_names, license=self.license)

    def checked(self, num_classes: int, guidable: bool) -> dict[str, Any]:
        """Those that are there, as a description holds them.

        guidable: whether the model has a null class. Raises TypeError or ValueError for names that
        don't fit the classes, for what is no plan, for a scale that the model can't have, and for a
        licence that is no text.
        """
        there: dict[str, Any] = {}
        if self.class_names is not None:
            there["class_names"] = checked_names(self.class_names, num_classes)
        if checked_plans(self.plans):
            there["plans"] = dict(self.plans)
        if self.guidance is not None:
            there["guidance"] = finite("guidance", self.guidance)
            if there["guidance"] != 1 and not guidable:
                raise ValueError(
                    f"guidance must be 1 for a model without a null class, got {self.guidance}"
                )
        if self.license is not None:
            if not isinstance(self.license, str) or unusable(self.license):
                raise ValueError(f"license must be a text of one line, got {self.license!r:.80}")
            there["license"] = self.license
        return there
