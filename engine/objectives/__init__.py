"""Training losses, one file a method. A new one joins `AnyObjective` and gets a recipe."""

from typing import Annotated

from pydantic import Field

from .base import Objective, Outcome, Passes
from .local_ball import LocalBall
from .pgd import PGD
from .trades import TRADES

AnyObjective = Annotated[LocalBall | PGD | TRADES, Field(discriminator="name")]

__all__ = ["PGD", "TRADES", "AnyObjective", "LocalBall", "Objective", "Outcome", "Passes"]
