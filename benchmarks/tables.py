"""Make the tables in the docs from the stored results: `python -m engine.benchmarks.tables`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine import results
from engine.compare import picture
from engine.text import percent

from . import predictions, scaling_picture
from .markdown import each, growth, header, short, times

# The comparison in README's table.
HEADLINE = "compare-curves"
# The comparisons on the first screen of docs/results.md, and the marks of their tables there.
SUMMARIES = {"compare-mnist": "summary-mnist", "compare-cifar10-jpeg": "summary-cifar10"}


def comparison(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of `engine compare` rows, by budget.

    Time is compared with PGD-10's longest training, or with the longest of all if PGD-10 is absent.
    A single budget is ordered by robust accuracy.
    """
    yardstick = [row for row in rows if row["method"] == "pgd-10"]
    full = max(row["train_seconds_mean"] for row in yardstick or rows)
    share = "time against pgd-10" if yardstick else "time against the longest"
    if rows[0]["clean_mean"] is None:
        scores = {"clean": "held-out clean %", "val_pgd": "held-out PGD %"}
        rows = [{**row, "clean_mean": row["val_clean_mean"]} for row in rows]
    else:
        attack = {"standard": "AutoAttack %", "apgd": "APGD %"}[rows[0]["autoattack_version"]]
        scores = {"clean": "clean %", "pgd": "PGD %", "autoattack": attack}
    lines = header("method", "passes", "epochs", "seeds", *scores.values(), "training s", share)
    judged = [*scores][-1]
    # A replay counts as an epoch, and does not always divide the budget.
    alone = len({row["method"] for row in rows}) == len(rows)
    for row in sorted(rows, key=lambda r: -r[f"{judged}_mean"] if alone else r["epochs"]):
        time = row["train_seconds_mean"]
        front = "**" if row["pareto"] else ""
        cells = [
            f"{front}{row['method']}{front}",
            row["passes_per_step"],
            row["epochs"],
            row["seeds"],
            *(
                percent(row[f"{score}_mean"], None if score == "clean" else row[f"{score}_sd"])
                for score in scores
            ),
            f"{time:.0f}",
            f"{time / full:.0%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def headline(rows: list[dict[str, Any]]) -> str:
    """Return README's table: the longest budget of every method."""
    longest = max(row["epochs"] for row in rows)
    chosen = [row for row in rows if row["epochs"] == longest]
    strong = next(row["train_seconds_mean"] for row in chosen if row["method"] == "pgd-10")
    lines = header(f"{longest} epochs", "passes", "clean %", "AutoAttack %", "time against PGD-10")
    for row in sorted(chosen, key=lambda row: -row["autoattack_mean"]):
        cells = [
            row["method"],
            row["passes_per_step"],
            percent(row["clean_mean"]),
            percent(row["autoattack_mean"], row["autoattack_sd"]),
            f"{row['train_seconds_mean'] / strong:.0%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def loaders(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of `engine bench loaders` rows."""
    lines = header(
        "images",
        "loader",
        "images/s",
        "ms a batch (p20 / p50 / p80)",
        "against torch's",
        "share of a step",
    )
    for row in rows:
        if row["loader"] == "null":
            continue
        times = " / ".join(f"{row[f'{q}_ms']:.2f}" for q in ("p20", "p50", "p80"))
        share = "" if row["share_of_step"] is None else f"{row['share_of_step']:.2%}"
        lines.append(
            f"| {row['shape']}, batch {row['batch']} | {row['loader']} | {row['images_per_s']:,} "
            f"| {times} | {row['speedup_vs_torch']:.1f}x | {share} |"
        )
    return "\n".join(lines)


def ops(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of `engine bench ops` rows: our backend against others."""
    lines = header(
        "op",
        "shape",
        "p50 ms",
        "GB/s",
        "share of a copy's speed",
        "faster than eager",
        "faster than torch.compile",
    )
    for row in rows:
        if row["backend"] in ("eager", "compile"):
            continue
        cells = [
            f"`{row['op']}`",
            row["shape"],
            f"{row['p50_ms']:.3f}",
            f"{row['gbps']:.1f}",
            f"{row['share_of_copy']:.0%}",
            times(row["speedup_vs_eager"]),
            times(row["speedup_vs_compile"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of `engine bench step` rows."""
    lines = header(
        "network",
        "objective",
        "k",
        "mode",
        "passes",
        "p50 ms",
        "over bare passes",
        "share of our PGD-10",
        "faster than",
    )
    for row in rows:
        share, rivals = row["share_of_pgd10"], row["speedup_vs"]
        cells = [
            f"`{row['network']}` {row['batch']}",
            row["objective"],
            row["k"],
            row["mode"],
            row["passes"],
            f"{row['p50_ms']:.0f}",
            f"{row['overhead_vs_passes']:.2f}",
            "-" if share is None else f"{share:.0%}",
            ", ".join(f"{name} {ratio:.1f}x" for name, ratio in rivals.items()) or "-",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def scaling(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of `engine bench scaling` rows: the ends of each axis."""
    lines = header(
        "axis",
        "method",
        "ms a step, measured",
        "growth",
        "FLOPs' growth",
        "H100 ms (predicted, never run)",
        "growth",
    )
    measured = [row for row in rows if row["p20_ms"] is not None]
    on_paper = {
        (row["axis"], row["value"], row["method"]): row for row in rows if row["p20_ms"] is None
    }
    for axis, method in dict.fromkeys((row["axis"], row["method"]) for row in measured):
        line = [row for row in measured if (row["axis"], row["method"]) == (axis, method)]
        ends = [chosen(line, key=lambda row: row["value"]) for chosen in (min, max)]
        predicted = [on_paper.get((axis, end["value"], method)) for end in ends]
        cells = [
            f"{axis} {ends[0]['value']} to {ends[1]['value']}",
            method,
            *growth([end["p50_ms"] for end in ends]),
            times(ends[1]["gflops"] / ends[0]["gflops"]),
            *growth([end["p50_ms"] for end in predicted if end is not None]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def end_to_end(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of `engine bench end-to-end` rows."""
    lines = header(
        "training",
        "passes",
        "s an epoch (p20 / p50 / p80)",
        "images/s",
        "passes/s",
        "GFLOP/s",
        "share of the peak",
        "time in steps",
        "faster than plain",
    )
    for row in rows:
        cells = [
            row["training"],
            row["passes"],
            " / ".join(f"{row[f'{q}_ms'] / 1e3:.3g}" for q in ("p20", "p50", "p80")),
            f"{row['images_per_s']:,}",
            f"{row['passes_per_s']:,.0f}",
            f"{row['gflop_per_s']:.1f}",
            f"{row['share_of_peak']:.0%}",
            f"{row['share_in_steps']:.0%}",
            times(row["speedup_vs_plain"]),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def accuracy(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of `engine bench accuracy` rows; time over the last recipe's."""
    lines = header(
        "recipe",
        "passes",
        "PGD target",
        "seeds that reach it",
        "training s to it (p20 / p50 / p80)",
        "epochs to it",
        f"time against {rows[-1]['recipe']}",
        "clean %",
        "PGD %",
    )
    for row in rows:
        seconds = (row[f"{q}_s"] for q in ("p20", "p50", "p80"))
        epochs, share = row["epochs_to_target"], row["share_of_last"]
        cells = [
            row["recipe"],
            row["passes"],
            f"{row['target']:.0%}",
            f"{row['reached']} of {row['seeds']}",
            " / ".join("-" if s is None else f"{s:.1f}" for s in seconds),
            "-" if epochs is None else f"{epochs:g}",
            "-" if share is None else f"{share:.0%}",
            percent(row["clean"]),
            percent(row["pgd"]),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def validation(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of `engine.benchmarks.validation` rows."""
    attacks = {
        "constant_ce": "constant step, cross-entropy",
        "constant_margin": "constant step, margin",
        "decaying_ce": "decaying step, cross-entropy",
        "decaying_margin": "decaying step, margin",
        "apgd": "APGD",
    }
    lines = [
        f"| run | clean % | {' % | '.join(attacks.values())} % |",
        "|---|---|" + "---|" * len(attacks),
    ]
    for row in rows:
        cells = [row["run"], *(percent(row[key]) for key in ("clean", *attacks))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def audit(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of `engine kernels` rows, one line a kernel.

    A cell holds a value for each architecture, or the common value.
    """
    lines = header(
        "kernel",
        "registers",
        "spills, local B",
        "shared B",
        "threads",
        "warps %",
        "load, store bits",
        "B an element, at least",
    )
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        builds = [row for row in rows if row["kernel"] == kernel]
        op = builds[0]["op"]
        cells = [
            f"`{kernel}`" if kernel == op else f"`{kernel}` of `{op}`",
            each(builds, lambda row: str(row["registers"])),
            each(builds, lambda row: f"{row['spill_bytes']}, {row['local_bytes']}"),
            each(builds, lambda row: str(row["shared_bytes"])),
            each(builds, lambda row: str(row["threads"])),
            each(builds, lambda row: f"{row['occupancy']:.0%}".rstrip("%")),
            each(builds, lambda row: f"{row['load_bits']}, {row['store_bits']}"),
            each(
                builds,
                lambda row: ", ".join(
                    short(row[key]) for key in ("bytes_per_element", "min_bytes_per_element")
                ),
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def evaluation(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of `engine bench evaluation` rows: both judges of AutoAttack."""
    lines = header(
        "network",
        "norm, eps",
        "images",
        "attack",
        "s, package",
        "s, engine",
        "ratio",
        "robust %, package",
        "robust %, engine",
        "same verdict",
    )
    for row in rows:
        agreement = row.get("agreement")
        cells = [
            f"{row['network']}, `{row['recipe']}`",
            f"{row['norm']}, {row['eps']:g}",
            row["images"],
            row["attack"],
            *(
                # Judges that did not run one after the other have no seconds to compare.
                "" if row[key] is None else f"{row[key]:{spec}}"
                for key, spec in (
                    ("seconds_pyautoattack", ".1f"),
                    ("seconds_engine", ".1f"),
                    ("ratio", ".2f"),
                )
            ),
            percent(row["robust_pyautoattack"]),
            percent(row["robust_engine"]),
            "" if agreement is None else f"{agreement:.1%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def stored() -> dict[str, tuple[str, str]]:
    """Return, by name of the stored result, the document that shows it and its table."""
    tables = {}
    makers = {
        "ops": ops,
        "step": step,
        "loaders": loaders,
        "scaling": scaling,
        "end-to-end": end_to_end,
        "accuracy": accuracy,
    }
    for path in sorted(results.FOLDER.glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if path.stem == "audit":
            tables[path.stem] = ("docs/kernels.md", audit(rows))
        elif path.stem == "validation":
            tables[path.stem] = ("docs/results-mnist.md", validation(rows))
        elif path.stem in ("evaluation", "agreement"):
            tables[path.stem] = ("docs/autoattack.md", evaluation(rows))
        elif path.stem in makers:
            tables[path.stem] = ("docs/performance.md", makers[path.stem](rows))
        else:
            tables[path.stem] = (_page_of(rows), comparison(rows))
        if path.stem == HEADLINE:
            tables["headline"] = ("README.md", headline(rows))
            tables["summary"] = ("docs/results.md", headline(rows))
        if path.stem in SUMMARIES:
            tables[SUMMARIES[path.stem]] = ("docs/results.md", comparison(rows))
    return tables


def _page_of(rows: list[dict[str, Any]]) -> str:
    """Return the page that shows a comparison.

    MNIST and CIFAR-10 have a page each; the searches on Fashion-MNIST have one.
    """
    dataset = rows[0]["dataset"]
    if "cifar10" in dataset:
        return "docs/results-cifar10.md"
    if dataset == "mnist":
        return "docs/results-mnist.md"
    searched = rows[0]["clean_mean"] is None
    return "docs/results-searches.md" if searched else "docs/results.md"


def write(root: Path) -> list[str]:
    """Put every table between its marks in the docs, and draw the pictures.

    The marks are `<!-- NAME -->` and `<!-- /NAME -->`.

    Returns:
        A line for each table and picture.
    """
    tables = stored() | {
        "plans": ("docs/plan.md", predictions.plans()),
        "full-scale": ("docs/recipes.md", predictions.full_scale()),
    }
    written = []
    for name, (document, table) in tables.items():
        path = root / document
        text = path.read_text(encoding="utf-8")
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{document} has no marks for {name}")
        before, rest = text.split(begin, 1)
        path.write_text(
            before + begin + "\n" + table + "\n\n" + end + rest.split(end, 1)[1], encoding="utf-8"
        )
        written.append(f"{document}: {name}")
    drawn: list[tuple[Path, Callable[[Mapping[str, Any], Path], None]]]
    drawn = [(path, picture.draw) for path in sorted(results.FOLDER.glob("compare-*.json"))]
    drawn += [(path, scaling_picture.draw) for path in results.FOLDER.glob("scaling.json")]
    for path, draw in drawn:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("score") == "validation":
            continue  # a search; its choice is drawn in another comparison
        image = root / "docs" / "images" / f"{path.stem}.png"
        draw(kept, image)
        written.append(str(image.relative_to(root)))
    return written


if __name__ == "__main__":
    for line in write(Path(__file__).resolve().parents[1]):
        print(line)
