"""Data sets as uint8 tensors: where they come from, how they are checked, how they are read."""

from .datasets import FileCheck, ImageSet, Info, info, load, names, verify
from .fetch import fetch

__all__ = ["FileCheck", "ImageSet", "Info", "fetch", "info", "load", "names", "verify"]
