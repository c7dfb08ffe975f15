"""Folders of pictures of any size, which are streamed: listed, indexed, framed, decoded."""

from .framing import Frames, Framing
from .index import Index, index_of
from .photos import Damaged, Photos, Sample, as_floats, of_index, scale_into, shifted, stacked

__all__ = [
    "Damaged",
    "Frames",
    "Framing",
    "Index",
    "Photos",
    "Sample",
    "as_floats",
    "index_of",
    "of_index",
    "scale_into",
    "shifted",
    "stacked",
]
