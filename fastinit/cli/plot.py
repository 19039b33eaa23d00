"""The picture of a benchmark's results: a panel for each suite, with who is missing written where the bar would be.

Axes begin at zero, but for growth with the number of parameters, where both are logarithmic.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

from matplotlib import pyplot
from matplotlib.axes import Axes

from . import text
from .results import Measured

OUT_OF_SCALE = 20.0  # times as long as fastinit: such a bar would leave no room for the others


def save(measured: list[Measured], path: Path, title: str) -> None:
    """Write a PNG."""
    suites = {
        suite: [each for each in measured if each.suite == suite] for suite in {each.suite: 0 for each in measured}
    }
    heights = [4.5 if is_growth(each) else 1.2 + 0.19 * len(each) for each in suites.values()]
    figure, axes = pyplot.subplots(
        len(suites), 1, figsize=(11, sum(heights) + 0.5), squeeze=False, height_ratios=heights
    )
    for (suite, of_suite), axis in zip(suites.items(), axes[:, 0], strict=True):
        axis.set_title(suite, fontsize=10, loc="left")
        (lines if is_growth(of_suite) else bars)(of_suite, axis)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.15 / figure.get_size_inches()[1]))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def colours(measured: list[Measured]) -> dict[str, str]:
    return {way: f"C{number % 10}" for number, way in enumerate(dict.fromkeys(each.way for each in measured))}


def bars(measured: list[Measured], axis: Axes) -> None:
    """The time or the rate of each way of each case, with the time to fastinit's."""
    by_rate = any("elements" in each.info for each in measured)
    colour, base = colours(measured), {each.case: each for each in measured if each.way == "fastinit" and each.seconds}
    y, ticks, labels = 0.0, [], []
    for case in dict.fromkeys(each.case for each in measured):
        of_case = [each for each in measured if each.case == case]
        ticks.append(y + (len(of_case) - 1) / 2)
        labels.append(case)
        for each in of_case:
            ratio = each.cost / base[case].cost if each.seconds and case in base else 1.0
            value, note = 0.0, f"{each.way}: {each.info.get('reason', '')}"[:100]
            if each.seconds:
                value = 1e-9 / each.cost if by_rate else each.median * 1e3
                shown = f"{value:.3g} G/s" if by_rate else text.seconds(each.median)
                note = f"{each.way}, {shown}, {ratio:.2f}x" + (
                    "; the values are wrong" if each.info.get("wrong") else ""
                )
            if not by_rate and ratio > OUT_OF_SCALE:
                value, note = 0.0, f"{note}, not drawn"
            axis.barh(y, value, 0.9, color=colour[each.way], xerr=value * each.spread if value else None)
            axis.annotate(f" {note}", (value * (1 + each.spread), y), va="center", fontsize=6)
            y += 1
        y += 0.7
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.3, y=0.01)
    axis.set_xlabel("1e9 elements per second" if by_rate else "milliseconds", fontsize=8)


def is_growth(measured: list[Measured]) -> bool:
    return measured[0].suite == "growth"


def lines(measured: list[Measured], axis: Axes) -> None:
    """Time by number of parameters, a line for each way on each device."""
    for (device, way), style in zip(
        {(each.info.get("device"), each.way): 0 for each in measured}, "osv^Dx*+<>" * 3, strict=False
    ):
        own = [each for each in measured if (each.info.get("device"), each.way) == (device, way) and each.seconds]
        xs, ys = [each.info["parameters"] for each in own], [each.median * 1e3 for each in own]
        axis.plot(xs, ys, marker=style, markersize=4, label=f"{way}, {device}")
    axis.set(xscale="log", yscale="log")
    axis.grid(True, which="major", alpha=0.3)
    axis.set_xlabel("parameters", fontsize=8)
    axis.set_ylabel("milliseconds", fontsize=8)
    axis.legend(fontsize=7)
