"""`engine doctor`: describe this machine, or tell whether a step can be captured."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import EngineError
from .shared import Commands, add_command, add_import, parse_overrides


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        "show this machine and the backend of each op; or tell whether a recipe's step can be "
        "captured in a CUDA graph",
        overridable=True,
    )
    parser.add_argument(
        "--capture", metavar="RECIPE", help="audit this recipe's step; needs no GPU"
    )
    add_import(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.capture is not None:
        return _audit(arguments.capture, parse_overrides(rest), arguments.json)
    if rest:
        raise EngineError(f"unknown argument {rest[0]} (see engine doctor --help)")
    from rich.table import Table

    from .. import kernels, models, recipes
    from ..device import apex
    from ..device.machine import environment
    from ..progress import stdout
    from ..runs import tuning

    about: dict[str, Any] = {
        "environment": {**environment(), "apex": apex.status()},
        "kernels": kernels.backends.table(),
        "models": sorted(models.names()),
        "recipes": recipes.names(),
        "step_forms": tuning.remembered(),
    }
    if arguments.json:
        print(json.dumps(about, indent=2))
        return 0
    for key, value in about["environment"].items():
        stdout.print(f"{key:14} {value}", highlight=False, soft_wrap=True)
    table = Table("op", "device", "backend", "why")
    for row in about["kernels"]:
        table.add_row(row["op"], row["device"], row["backend"], row["why"])
    stdout.print(table)
    stdout.print("models:", ", ".join(about["models"]), highlight=False, soft_wrap=True)
    stdout.print("recipes:", ", ".join(about["recipes"]), highlight=False, soft_wrap=True)
    for line in about["step_forms"]:
        stdout.print("step.compile = auto:", line, highlight=False, soft_wrap=True)
    return 0


def _audit(name: str, overrides: dict[str, str], as_json: bool) -> int:
    from dataclasses import asdict

    from .. import recipes
    from ..performance import capture_audit

    audit = capture_audit.audit(recipes.load(name, overrides))
    if as_json:
        print(json.dumps({**asdict(audit), "ok": audit.ok}))
        return 0 if audit.ok else 1
    print(
        f"{audit.recipe}: the step can be captured in a CUDA graph; "
        "its replays are the eager steps, bit for bit"
        if audit.ok
        else f"{audit.recipe}: the step cannot be captured in a CUDA graph"
    )
    if audit.stand_in:
        print(
            f"  recorded with {audit.stand_in} in place of apex's optimiser, which has no CPU form"
        )
    for complaint in audit.complaints:
        print(f"  {complaint}")
    print("operators a step, views and allocations left out:")
    for phase, count in sorted(audit.ops.items(), key=lambda item: -item[1]):
        print(f"  {count:5} {phase}")
    print(
        f"outside the network: {audit.attack_step_ops:g} per attack step, {audit.loss_ops} for the "
        f"loss, {audit.optimiser_ops} for the optimiser and the average"
    )
    return 0 if audit.ok else 1
