"""Training losses, one file for each method; `register` gives recipes a new one."""

from .base import OBJECTIVES, Objective, Outcome, Passes, register
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

for _kind in (
    *(LocalBall, PGD, TRADES, MART, NFGSM, FGSMPGI),
    *(GradAlign, LLR, GAT, NuAT, LIET, Clean),
):
    register(_kind)

__all__ = [
    "FGSMPGI",
    "GAT",
    "LIET",
    "LLR",
    "MART",
    "NFGSM",
    "OBJECTIVES",
    "PGD",
    "TRADES",
    "Clean",
    "GradAlign",
    "LocalBall",
    "NuAT",
    "Objective",
    "Outcome",
    "Passes",
    "register",
]
