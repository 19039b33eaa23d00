"""The picture of a benchmark's results: a panel for each suite, with who is missing written where the bar would be.

Axes begin at zero, but for growth with the number of parameters, where both are logarithmic.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

from matplotlib import pyplot
from matplotlib.axes import Axes

from .results import Measured, cell, grouped

OUT_OF_SCALE = 20.0  # times as long as fastinit: such a bar would leave no room for the others


def save(measured: list[Measured], path: Path, title: str) -> None:
    """Write a PNG."""
    suites = grouped(measured, lambda each: each.suite)
    heights = [4.5 if suite == "growth" else 1.2 + 0.19 * len(each) for suite, each in suites.items()]
    figure, axes = pyplot.subplots(
        len(suites), 1, figsize=(11, sum(heights) + 0.5), squeeze=False, height_ratios=heights
    )
    for (suite, of_suite), axis in zip(suites.items(), axes[:, 0], strict=True):
        axis.set_title(suite, fontsize=10, loc="left")
        (lines if suite == "growth" else bars)(of_suite, axis)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.15 / figure.get_size_inches()[1]))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bars(measured: list[Measured], axis: Axes) -> None:
    """The time or the rate of each way of each case, with what a table has of it."""
    by_rate = any("elements" in each.info for each in measured)
    ways = list(grouped(measured, lambda each: each.way))
    y, ticks = 0.0, {}
    for case, of_case in grouped(measured, lambda each: each.case).items():
        ticks[y + (len(of_case) - 1) / 2] = case
        base = next((each for each in of_case if each.way == "fastinit" and each.seconds), None)
        for each in of_case:
            value, note = 0.0, each.info.get("reason") or cell(each, base)
            if not by_rate and each.seconds and base is not None and each.cost > OUT_OF_SCALE * base.cost:
                note += ", not drawn"
            elif each.seconds:
                value = 1e-9 / each.cost if by_rate else each.median * 1e3
            colour, error = f"C{ways.index(each.way) % 10}", value * each.spread if value else None
            axis.barh(y, value, 0.9, color=colour, xerr=error)
            axis.annotate(f" {each.way}: {note}"[:100], (value * (1 + each.spread), y), va="center", fontsize=6)
            y += 1
        y += 0.7
    axis.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.3, y=0.01)
    axis.set_xlabel("1e9 elements per second; ! where values are wrong" if by_rate else "milliseconds", fontsize=8)


def lines(measured: list[Measured], axis: Axes) -> None:
    """Time by number of parameters, a line for each way on each device, which ends the names of cases."""
    groups = grouped((each for each in measured if each.seconds), lambda each: (each.way, each.case.split(", ")[-1]))
    for (way, device), style in zip(groups, "osv^Dx*+<>" * 3, strict=False):
        own = groups[way, device]
        xs, ys = [each.info["parameters"] for each in own], [each.median * 1e3 for each in own]
        axis.plot(xs, ys, marker=style, markersize=4, label=f"{way}, {device}")
    axis.set(xscale="log", yscale="log")
    axis.grid(True, which="major", alpha=0.3)
    axis.set_xlabel("parameters", fontsize=8)
    axis.set_ylabel("milliseconds", fontsize=8)
    axis.legend(fontsize=7)
