"""What decides a result, said beside each field of a config, and the digests that are taken of it.

A data set's folder and manifest, a run's folder and a stage's mark are all named by a digest of the config that they
come from. A field takes part in every one of them unless it is marked:

    save_every: Annotated[int, Decides.NOTHING] = 100
"""

import enum
import hashlib
import json
import logging
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Decides(enum.Enum):
    """Mark of a field that does not decide everything."""

    NOTHING = "nothing"
    """Speed, memory, bookkeeping: the same model comes out, to the last bits of its sums."""
    RUN = "run"
    """Which run it is, but not what is in the data set."""
    WHEN_SET = "when set"
    """Everything, once it differs from its default. For fields that came later than the digests of existing work, which
    stay as they are."""


class StrictModel(BaseModel):
    """Base of all config and manifest models: unknown keys are errors, the string under a field documents it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    RENAMED: ClassVar[dict[str, str]] = {}
    """Fields by the names that they had before, which are accepted with a note."""

    @model_validator(mode="before")
    @classmethod
    def _accept_earlier_names(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not cls.RENAMED.keys() & content.keys():
            return content
        for before, now in cls.RENAMED.items():
            if before in content and now in content:
                raise ValueError(f"{before} and {now} are one field: give {now} alone")
            if before in content:
                logging.getLogger("mlmamba").warning("%s is called %s now; the old name is still read", before, now)
        return {cls.RENAMED.get(name, name): value for name, value in content.items()}


def identity(model: BaseModel, *without: Decides) -> dict[str, Any]:
    """The fields of a config that decide a result, as plain data.

    Args:
        without: marks whose fields are left out, besides `Decides.NOTHING`.
    """
    content = model.model_dump(mode="json")
    left_out = {Decides.NOTHING, *without}
    found = {}
    for name, field in type(model).model_fields.items():
        marks = {mark for mark in field.metadata if isinstance(mark, Decides)}
        value = getattr(model, name)
        unset = Decides.WHEN_SET in marks and value == field.get_default(call_default_factory=True)
        if name in content and not marks & left_out and not unset:
            found[name] = _plain(value, content[name], without)
    return found


def _plain(value: Any, dumped: Any, without: tuple[Decides, ...]) -> Any:
    if isinstance(value, BaseModel):
        return identity(value, *without)
    if isinstance(value, list):
        return [_plain(item, content, without) for item, content in zip(value, dumped, strict=True)]
    return dumped


def digest(*parts: object) -> str:
    """Ten hex digits that change when any of the JSON-able parts does."""
    text = json.dumps(parts, sort_keys=True, default=lambda model: model.model_dump(mode="json"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]
