"""The computations of the hot path, without any knowledge of training.

`ops` defines the ops; `backends` chooses the backend that serves each of them.
"""

from . import backends, ops, reference
from .backends import capturing
from .layout import outputs_innermost
from .ops import *  # noqa: F403

__all__ = ["backends", "capturing", "ops", "outputs_innermost", "reference"]
__all__ += ops.__all__
