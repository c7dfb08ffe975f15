"""Recipes: TOML files, validated into typed values; the command line can change any field."""

from .fields import LoggerName, Recipe
from .reading import (
    dump,
    load,
    merged,
    names,
    nearest,
    objectives,
    options,
    overridden,
    parse,
    read_toml,
    tree,
)

__all__ = [
    "LoggerName",
    "Recipe",
    "dump",
    "load",
    "merged",
    "names",
    "nearest",
    "objectives",
    "options",
    "overridden",
    "parse",
    "read_toml",
    "tree",
]
