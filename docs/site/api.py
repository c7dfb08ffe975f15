"""Completes the docstrings on the API page: fields with their units, formulas, whole sections."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import griffe

_HEAD = re.compile(r"(Args|Attributes|Returns|Raises):$")
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Docstrings(griffe.Extension):
    """Complete docstrings while griffe reads the source."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Bring the sections into the parser's form, and add the module's formula to a method."""
        if obj.is_attribute:
            # The description gives a field's units and range in words.
            obj.annotation = _bare(obj.annotation)
        if obj.docstring is None:
            return
        text, fields = "\n".join(_parted(obj.docstring.value)), _fields(obj)
        if fields and obj.module.path.startswith("engine.objectives."):
            text = f"{obj.module.docstring.value}\n\n{text}"
        obj.docstring.value = text + fields


def _bare(annotation: Any) -> Any:
    """Return T for `Annotated[T, ...]`, also within a union."""
    while (
        isinstance(annotation, griffe.ExprSubscript)
        and annotation.canonical_path == "typing.Annotated"
    ):
        annotation = annotation.slice.elements[0]
    if isinstance(annotation, griffe.ExprBinOp):
        annotation.left, annotation.right = _bare(annotation.left), _bare(annotation.right)
    return annotation


def _parted(text: str) -> Iterator[str]:
    """Yield a docstring's lines in the parser's form.

    The parser needs a blank line before a section, and an indent before a result's second line.
    """
    within, entries = "", 0
    for line in text.splitlines():
        if head := _HEAD.match(line):
            within, entries = head[1], 0
            yield ""
        elif not line.startswith(" "):
            within = ""
        elif within:
            entries += 1
            if within == "Returns" and entries > 1 and not re.match(r" *\w+: ", line):
                line = f"    {line}"
        yield line


def _fields(obj: griffe.Object) -> str:
    """Return an `Attributes` section for a validated dataclass; empty for anything else."""
    if not obj.is_class or not obj.path.startswith("engine."):
        return ""
    if not any("pydantic.dataclasses" in d.callable_path for d in obj.decorators):
        return ""
    lines = []
    for name, field in getattr(
        import_module(obj.module.path), obj.name
    ).__pydantic_fields__.items():
        if field.description is None or f" {name}: " in obj.docstring.value:
            continue
        words = [field.description]
        if ".." not in field.description:
            words += [
                f"{sign} {getattr(rule, bound):g}"
                for rule in field.metadata
                for bound, sign in _BOUNDS.items()
                if getattr(rule, bound, None) is not None
            ]
        lines.append(f"    {name}: " + "; ".join([*words, f"default `{field.get_default()!r}`"]))
    return "\n\nAttributes:\n" + "\n".join(lines) if lines else ""
