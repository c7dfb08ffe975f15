"""What the API page shows besides the docstrings as they stand: fields with their units, sources, whole sections."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import griffe

_HEAD = re.compile(r"(Args|Attributes|Returns|Raises):$")
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Docstrings(griffe.Extension):
    """Completes docstrings while the source is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Bring the sections into the parser's form; put a method's formula and paper, which its module tells, with its class."""
        if obj.is_attribute:
            # A field's units and range are told in words.
            obj.annotation = _bare(obj.annotation)
        if obj.docstring is None:
            return
        text, fields = "\n".join(_parted(obj.docstring.value)), _fields(obj)
        if fields and obj.module.path.startswith("engine.objectives."):
            text = f"{obj.module.docstring.value}\n\n{text}"
        obj.docstring.value = text + fields


def _bare(annotation: Any) -> Any:
    """`Annotated[T, ...]` as T."""
    while (
        isinstance(annotation, griffe.ExprSubscript)
        and annotation.canonical_path == "typing.Annotated"
    ):
        annotation = annotation.slice.elements[0]
    if isinstance(annotation, griffe.ExprBinOp):
        annotation.left, annotation.right = _bare(annotation.left), _bare(annotation.right)
    return annotation


def _parted(text: str) -> Iterator[str]:
    """The lines of a docstring, with what the parser wants of a section and people do without.

    That is a blank line before it, and the second line of a result indented.
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
    """An `Attributes` section of the fields of a validated dataclass; empty for anything else."""
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
