"""Data sets as uint8 tensors: fetched, checked, read."""

from .datasets import FileCheck, ImageSet, Info, info, load, names, verify
from .fetch import fetch

__all__ = ["FileCheck", "ImageSet", "Info", "fetch", "info", "load", "names", "verify"]
