"""Training losses, one file for each method; a new one joins `AnyObjective` and gets a recipe."""

from typing import Annotated

from pydantic import Field

from .base import Objective, Outcome, Passes
from .clean import Clean
from .fgsm_pgi import FGSMPGI
from .gat import GAT
from .grad_align import GradAlign
from .liet import LIET
from .llr import LLR
from .local_ball import LocalBall
from .mart import MART
from .n_fgsm import NFGSM
from .nuat import NuAT
from .pgd import PGD
from .trades import TRADES

AnyObjective = Annotated[
    LocalBall | PGD | TRADES | MART | NFGSM | FGSMPGI | GradAlign | LLR | GAT | NuAT | LIET | Clean,
    Field(discriminator="name"),
]

__all__ = [
    "FGSMPGI",
    "GAT",
    "LIET",
    "LLR",
    "MART",
    "NFGSM",
    "PGD",
    "TRADES",
    "AnyObjective",
    "Clean",
    "GradAlign",
    "LocalBall",
    "NuAT",
    "Objective",
    "Outcome",
    "Passes",
]
