"""Folders of pictures of any size, which are streamed: listed, indexed, framed, decoded."""

from .framing import Framing
from .index import Index, index_of
from .photos import Damaged, Photos, Sample, as_floats, of_index, shifted, stacked

__all__ = [
    "Damaged",
    "Framing",
    "Index",
    "Photos",
    "Sample",
    "as_floats",
    "index_of",
    "of_index",
    "shifted",
    "stacked",
]
