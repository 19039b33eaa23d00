"""What the commands show on the terminal: tables, numbers with their units, progress."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")

_COUNTS = {"B": 1e9, "M": 1e6, "K": 1e3}


def _console(**options: Any) -> Any:
    try:
        from rich.console import Console
    except ImportError as error:
        raise RuntimeError("rich is not installed, for tables: pip install 'torch-fastinit[demo]'") from error
    return Console(**options)


def show_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print columns under a header, the first one aligned left, the others right.

    Raises:
        RuntimeError: rich is not installed.
    """
    console = _console(markup=False, highlight=False)
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    if not console.is_terminal:
        console.width = 240  # a file gets the whole table
    console.print(table)


def progress(items: Sequence[Item], description: str) -> Iterable[Item]:
    """The same items, with a progress bar if standard error is a terminal.

    Raises:
        RuntimeError: rich is not installed.
    """
    console = _console(stderr=True)
    from rich.progress import track

    tracked: Iterable[Item] = track(
        items, description, console=console, transient=True, disable=not console.is_terminal
    )
    return tracked


def seconds(value: float) -> str:
    return _scaled(value, {" s": 1.0, " ms": 1e-3, " us": 1e-6})


def size(nbytes: float) -> str:
    return _scaled(nbytes, {" GiB": 2.0**30, " MiB": 2.0**20, " KiB": 2.0**10, " B": 1.0}, digits=4)


def count(number: float) -> str:
    """A number of parameters the way people say it: 1.35B, 355M."""
    return _scaled(number, {**_COUNTS, "": 1.0})


def _scaled(value: float, units: dict[str, float], digits: int = 3) -> str:
    """In the first of the units that it has one of, or else in the last."""
    unit = next((unit for unit, scale in units.items() if abs(value) >= scale), list(units)[-1])
    return f"{value / units[unit]:.{digits}g}{unit}"


def parse_count(argument: str) -> int:
    """The inverse of `count`, for the command line: "1.3B", "350M", "5e6"."""
    scale = _COUNTS.get(argument[-1:].upper(), 1.0)
    try:
        number = float(argument[:-1] if scale > 1.0 else argument) * scale
    except ValueError:
        number = 0.0
    if not 1 <= number < 1e15:
        raise ValueError(f'{argument!r} is not a number of parameters; write it like "1.3B", "350M" or "5e6"')
    return int(number)
