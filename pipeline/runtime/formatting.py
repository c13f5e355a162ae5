"""Numbers, durations and tables as text for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def scaled(value: float, step: int) -> str:
    """A value with three digits and a prefix: "12.3 G", or "12.3 Gi" with `step` 1024. The unit follows immediately."""
    prefixes = ["", "k" if step == 1000 else "Ki", *(p + ("i" if step == 1024 else "") for p in "MGTPEZ")]
    index = 0
    while abs(value) >= 999.5 and index < len(prefixes) - 1:
        value, index = value / step, index + 1
    return f"{value:.3g} {prefixes[index]}"


def duration(seconds: float | None) -> str:
    """Seconds in two units at most, as in "2 h 5 min"; "? s" for None."""
    if seconds is None:
        return "? s"
    whole = round(seconds)
    for unit, lower, name, smaller in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= unit:
            rest = whole % unit // lower
            return f"{whole // unit} {name} {rest} {smaller}" if rest else f"{whole // unit} {name}"
    return f"{whole} s"
