"""What initializes each parameter and buffer of a model, without memory for it.

The factory is called in a block that records and writes nothing, so that a model of any size can be looked at. The
table says what writes each tensor and what was overwritten, and below it what is worth a look: parameters that nothing
initializes, that are initialized twice and differently, or whose spread is far from fan-in and fan-out scaling.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..context import on
from ..layout import Box, numel
from ..materialization import Named, unwritten_tensors
from ..recipe import CALLED
from ..record.unwritten import Piece, write_pieces
from ..report import TensorReport, pattern_of

# As many elements of a tensor give its standard deviation to about 0.1 %.
_SAMPLED = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("factory", help="what to call for the model, as package.module:function")
    parser.add_argument("--dtype", default="fp32", help="precision of the model (fp32)")
    parser.add_argument("--seed", type=int, default=0, help="key of the random values (0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw expected and sampled standard deviations (needs matplotlib)",
    )


def run(arguments: argparse.Namespace) -> int:
    factory = find(arguments.factory)
    with on("cpu", arguments.dtype, seed=arguments.seed, shard=True) as report:
        model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{arguments.factory} returned {type(model).__name__}; it has to return a torch.nn.Module")
    print(report.to_json() if arguments.json else f"{report}\n\n{report.table()}")
    if arguments.plot is not None:
        plot(report.tensors, sampled_stds(model), f"{arguments.factory}, seed {arguments.seed}", arguments.plot)
        print(arguments.plot, file=sys.stderr)
    return 0


def find(name: str) -> Callable[[], Any]:
    """The function that "package.module:function" names; modules in the current folder are found, too.

    Raises:
        ValueError: there is no such module or function, or it takes arguments.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"{name!r} names no function; write it as package.module:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not module_name.startswith(error.name or "-"):
            raise
        raise ValueError(f"{name!r} is not there: {error}") from error
    if not callable(found):
        raise ValueError(f"{name!r} is {type(found).__name__} and no function; name what returns the model")
    try:
        with suppress(ValueError):  # some functions of C do not tell what they take
            signature(found).bind()
    except TypeError as error:
        raise ValueError(f"{name!r} cannot be called as {path}(): {error}; name what takes no arguments") from None
    function: Callable[[], Any] = found
    return function


def sampled_stds(model: nn.Module) -> dict[str, float]:
    """Standard deviations of the values that parameters will have, by name, each from up to a million of them.

    Those that are computed of others, and so only as a whole, are left out if they are larger than that.
    """
    stds = {}
    for each in unwritten_tensors(model):
        values = _sample(each)
        if values is not None:
            stds[each.name] = values.std(correction=0).item()
    return stds


def _sample(each: Named) -> torch.Tensor | None:
    origin = each.origin
    rows = origin.shape[0] if origin.shape else 1
    row = numel(origin.shape) // rows
    step = math.ceil(numel(origin.shape) / _SAMPLED)
    if step > 1 and origin.recipe and origin.recipe[0].kind == CALLED:
        return None
    # Rows that are evenly spaced: what is written in parts, a fused projection say, has some of each.
    count = math.ceil(rows / step)
    values = torch.empty(count, row)
    write_pieces([Piece(values, origin, [Box(0, (count, row), (step * row, 1), 0, (row, 1))])])
    return values


def plot(tensors: list[TensorReport], sampled: dict[str, float], title: str, path: Path) -> None:
    """Draw standard deviations of parameters: a row for those of one role, from the first layer above to the last."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, needs no display
    from matplotlib import pyplot

    rows: dict[str, list[TensorReport]] = {}
    for each in tensors:
        if sampled.get(each.name):
            rows.setdefault(_kind(each.name), []).append(each)
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.35 * len(rows)), layout="constrained")
    shown: dict[str, list[tuple[float, float]]] = {"1 / sqrt(fan-in)": [], "expected": [], "sampled": []}
    for row, layers in enumerate(rows.values()):
        for number, each in enumerate(layers):
            y = row + 0.7 * ((number + 0.5) / len(layers) - 0.5)
            shown["sampled"].append((sampled[each.name], y))
            if each.std:
                shown["expected"].append((each.std, y))
            if each.fans is not None:
                shown["1 / sqrt(fan-in)"].append((1 / math.sqrt(each.fans[0]), y))
    for (label, points), style in zip(shown.items(), ("|", "|", "."), strict=True):
        colour = {"sampled": "tab:blue", "expected": "black"}.get(label, "silver")
        axis.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4 if style == "." else 6)
    axis.set_xscale("log")
    least, greatest = axis.get_xlim()
    axis.set_xlim(min(least, 1e-3), max(greatest, 1.0))
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("standard deviation")
    axis.set_title(title, fontsize=10)
    axis.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _kind(name: str) -> str:
    """What tensors of one role in different layers have in common."""
    return ".".join(pattern_of(name).rpartition("*.")[2].split(".")[-2:])
