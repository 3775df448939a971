"""A recipe: the base model and each stage's options, as a YAML file that people read and keep.

For example::

    base: gpt2
    block_size: 1024
    prepare: {corpus: docs/, documents: file}
    adapt: {epochs: 3}
    targets: {k: 512}
    train: {memory_layers: 8}

A stage's options are the fields of its configuration. ``block_size``, ``isolate_documents``, ``seed``
and ``device`` hold for every stage that has them and does not say otherwise. ``adapt: false`` leaves
the teacher as it is; ``control: {}`` also fine-tunes the base with plain cross-entropy, for as many
epochs as adapt and train together, to compare with. Paths are relative to where the command runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from memdec.errors import MemdecError

STAGES = ("prepare", "adapt", "datastore", "targets", "train", "control", "eval")
OPTIONAL_STAGES = {"adapt": True, "control": False}  # and whether they are on by default
SHARED = ("block_size", "isolate_documents", "seed", "device")


@dataclass(frozen=True)
class Recipe:
    """A base, and per stage its options; None for a stage that is left out."""

    base: str
    teacher: str | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Checks names and shapes; a stage's own options are checked by its configuration.

        Raises:
            MemdecError: no base, a key that a recipe does not have, a stage that is no mapping.
        """
        known = ("base", "teacher", *SHARED, *STAGES)
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise MemdecError(f"a recipe has no key {key!r}; {hint}")
        for key in ("base", "teacher"):
            if not isinstance(values.get(key), str | None):
                raise MemdecError(f"{key} must be text, got {values[key]!r}")
        if values.get("base") is None:
            raise MemdecError("expected a base model: --base, or base: in the recipe")
        return cls(
            base=values["base"],
            teacher=values.get("teacher"),
            shared={key: values[key] for key in SHARED if values.get(key) is not None},
            stages={name: _stage_options(name, values.get(name)) for name in STAGES},
        )

    def to_mapping(self) -> dict[str, Any]:
        """The recipe as plain YAML types; :meth:`from_mapping` gives it back."""
        stages = {
            name: False if options is None else options for name, options in self.stages.items()
        }
        teacher = {} if self.teacher is None else {"teacher": self.teacher}
        return {"base": self.base, **teacher, **self.shared, **stages}


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
        MemdecError: no such file, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MemdecError(f"the recipe {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise MemdecError(f"the recipe {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise MemdecError(f"expected a mapping in the recipe {path}, got {values!r:.60}")
    return values


def set_option(values: dict[str, Any], stage: str, option: str, value: Any) -> None:
    """Sets one stage's option in a recipe's mapping, whatever the recipe says about the stage."""
    options = values.get(stage)
    values[stage] = {**(options if isinstance(options, dict) else {}), option: value}


def parse_setting(text: str) -> tuple[str, str, Any]:
    """``"train.epochs=3"`` as stage, option and value, which is read as YAML."""
    name, equals, value = text.partition("=")
    stage, dot, option = name.partition(".")
    if not (equals and dot and option) or stage not in STAGES:
        raise MemdecError(
            f"expected --set STAGE.OPTION=VALUE with a stage of {', '.join(STAGES)}, got {text!r}"
        )
    try:
        return stage, option, yaml.safe_load(value)
    except yaml.YAMLError:
        return stage, option, value


def _stage_options(name: str, value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict):
        return dict(value)
    if value is None:
        return {} if OPTIONAL_STAGES.get(name, True) else None
    if isinstance(value, bool) and name in OPTIONAL_STAGES:
        return {} if value else None
    raise MemdecError(f"{name} must be a mapping of options in a recipe, got {value!r}")
