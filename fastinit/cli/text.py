"""What the commands show on the terminal: tables, numbers with their units, progress."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a header, the first one aligned left, the others right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.lstrip().ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def seconds(value: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def size(nbytes: float) -> str:
    magnitude = abs(nbytes)
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if magnitude >= 2**exponent:
            return f"{nbytes / 2**exponent:.4g} {unit}"
    return f"{nbytes:.0f} B"


def count(number: float) -> str:
    """A number of parameters the way people say it: 1.35B, 355M."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.0f}"


def parse_count(argument: str) -> int:
    """The inverse of `count`, for the command line: "1.3B", "350M", "5e6"."""
    scales = {"K": 1e3, "M": 1e6, "B": 1e9}
    scale = scales.get(argument[-1:].upper(), 1.0)
    try:
        number = float(argument[:-1] if scale > 1.0 else argument) * scale
    except ValueError:
        number = 0.0
    if not 1 <= number < 1e15:
        raise ValueError(f'{argument!r} is not a number of parameters; write it like "1.3B", "350M" or "5e6"')
    return int(number)


def progress(items: Sequence[Item], description: str, unit: str) -> Iterable[Item]:
    """The same items, with a progress bar on standard error if tqdm is installed and that is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    shown: Iterable[Item] = tqdm(items, desc=description, unit=unit, leave=False, disable=None)
    return shown
