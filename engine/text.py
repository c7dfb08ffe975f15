"""Write numbers as people read them."""

from __future__ import annotations


def percent(mean: float | None, deviation: float | None = None) -> str:
    """Write a share [0..1] in percent, with its deviation where there is one: "49.1 ± 0.3"."""
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def duration(seconds: float) -> str:
    """Write seconds in their own unit: "12.3 s", "4 min 05 s", "2 h 07 min"."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
