"""Fast adversarial training: robust networks from weak adversaries and local balls.

import engine
result = engine.train(model, (images, labels), engine.Linf("8/255"))
report = engine.evaluate(result.model, x, y, engine.Linf("8/255"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import EngineError

if TYPE_CHECKING:
    # The top-level folder kernels/ is mounted here by the build; type checkers do not see that.
    kernels: Any
    from .adversary import Attack
    from .api import attack, evaluate, train
    from .memory import AdversaryMemory
    from .objectives import (
        FGSMPGI,
        GAT,
        LIET,
        LLR,
        MART,
        NFGSM,
        PGD,
        TRADES,
        Clean,
        GradAlign,
        LocalBall,
        NuAT,
        Objective,
        Outcome,
    )
    from .schedule import Schedule
    from .threat import L2, Linf, ThreatModel
    from .trainer import Hooks, Result

# Loaded on first use: `import engine` and `engine --help` do not wait for torch.
_HOMES = {
    "FGSMPGI": "objectives",
    "GAT": "objectives",
    "LIET": "objectives",
    "LLR": "objectives",
    "MART": "objectives",
    "NFGSM": "objectives",
    "PGD": "objectives",
    "TRADES": "objectives",
    "Clean": "objectives",
    "GradAlign": "objectives",
    "AdversaryMemory": "memory",
    "Attack": "adversary",
    "Hooks": "trainer",
    "L2": "threat",
    "Linf": "threat",
    "LocalBall": "objectives",
    "NuAT": "objectives",
    "Objective": "objectives",
    "Outcome": "objectives",
    "Result": "trainer",
    "Schedule": "schedule",
    "ThreatModel": "threat",
    "attack": "api",
    "evaluate": "api",
    "train": "api",
}

__all__ = [
    "FGSMPGI",
    "GAT",
    "L2",
    "LIET",
    "LLR",
    "MART",
    "NFGSM",
    "PGD",
    "TRADES",
    "AdversaryMemory",
    "Attack",
    "Clean",
    "EngineError",
    "GradAlign",
    "Hooks",
    "Linf",
    "LocalBall",
    "NuAT",
    "Objective",
    "Outcome",
    "Result",
    "Schedule",
    "ThreatModel",
    "attack",
    "evaluate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value
