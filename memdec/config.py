"""Configuration as dataclasses: a stage's fields carry their own help and check themselves.

The same fields are the keyword arguments of the library call, the flags of the command and the keys
of a recipe, so each option is written once.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from memdec.errors import MemdecError

_SEEDS = 1 << 32  # that NumPy takes


def option(default: Any = dataclasses.MISSING, *, help: str, item: str | None = None) -> Any:
    """A dataclass field with its help text; without a default the field is required.

    `item` is the form of one item of a list, for example ``"NAME=PATH"``, for its error messages.
    """
    return dataclasses.field(default=default, metadata={"help": help, "item": item})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the stages' configurations.

    Values are converted to the annotated type where nothing is lost (a recipe's ``1`` for a float,
    a string for a path); anything else raises :class:`MemdecError` naming field, expectation and
    value. Subclasses override :meth:`check` for ranges.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            item = field.metadata.get("item")
            value = convert(field.name, getattr(self, field.name), hints[field.name], item)
            object.__setattr__(self, field.name, value)
        if (seed := getattr(self, "seed", None)) is not None:  # wherever there is one
            require(0 <= seed < _SEEDS, "seed", f"in [0, {_SEEDS})", seed)
        self.check()

    def check(self) -> None:
        """Raises :class:`MemdecError` when a value is out of range."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Builds the configuration from a recipe's mapping; an unknown key is an error."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise MemdecError(f"there is no option {key!r}{hint}")
        required = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in values
        ]
        if required:
            raise MemdecError(f"missing: {', '.join(map(repr, required))}")
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """The values as plain JSON types, in the order of the fields."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def require(condition: bool, name: str, expected: str, value: Any) -> None:
    """Raises :class:`MemdecError` in the one form that range checks use."""
    if not condition:
        raise MemdecError(f"{name} must be {expected}, got {value!r}")


def require_temperature(value: float) -> None:
    """Raises :class:`MemdecError` unless float32 has room for it, its inverse, and a score beside."""
    require(1e-30 <= value <= 1e30, "temperature", "from 1e-30 to 1e30", value)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def convert(name: str, value: Any, hint: Any, item: str | None = None) -> Any:
    """The value as the annotated type, where nothing is lost.

    Raises:
        MemdecError: anything else; it gives name, expectation and value.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(hint)
        if value is None and type(None) in choices:
            return None
        for choice in choices:
            if choice is not type(None):
                try:
                    return convert(name, value, choice)
                except MemdecError:
                    continue
        raise MemdecError(f"{name} must be {_describe(hint)}, got {value!r}")
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(convert(name, one, typing.get_args(hint)[0], item) for one in value)
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str):
            try:
                return int(value)
            except ValueError:
                pass
    elif hint is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)  # YAML reads 5e-5 as a string
            except (ValueError, OverflowError):
                pass
    elif hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    elif isinstance(value, hint):
        return value
    expected = f"a list [{item}, ...]" if origin is tuple and item else item or _describe(hint)
    raise MemdecError(f"{name} must be {expected}, got {value!r}")


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in typing.get_args(hint))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if origin is tuple:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    names = {
        int: "an integer",
        float: "a number",
        str: "text",
        bool: "true or false",
        Path: "a path",
        dict: "a mapping",
    }
    return "nothing" if hint is type(None) else names.get(hint, str(hint))
