"""An engine's options, from ``--option KEY=VALUE`` to typed values. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rank_search.errors import InputError

_Options = TypeVar("_Options", bound="Options")


class Options(BaseModel):
    """Base of the engines' options; every field is documented by a string below it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def parse_options(kind: type[_Options], engine: str, given: Mapping[str, str]) -> _Options:
    """Check the options of an engine.

    Raises:
        InputError: an option that the engine does not have, lacks, or cannot take; names it.
    """
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, kind.model_fields, n=1, cutoff=0.5)
            known = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(kind.model_fields)}"
            raise InputError(f"--on {engine} has no option {name!r}; {known}") from None
        if first["type"] == "missing":
            about = (kind.model_fields[name].description or "").partition("\n")[0]
            raise InputError(f"--on {engine} needs --option {name}=...: {about}") from None
        raise InputError(f"--on {engine}: option {name}: {first['msg']}, not {first['input']!r}") from None
