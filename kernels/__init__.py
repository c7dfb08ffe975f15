"""What the hot path computes; knows nothing of training. See `ops` for the ops, `backends` for who serves them."""

from . import backends, ops, reference
from .backends import capturing
from .ops import *  # noqa: F403

__all__ = ["backends", "capturing", "ops", "reference"]
__all__ += ops.__all__
