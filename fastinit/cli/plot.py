"""The picture of a benchmark's results.

Axes of times and rates begin at zero, but for growth, where both are logarithmic. Who is missing or has failed is
written where the bar would be.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import machine as machines
from . import text
from .peers import PEERS
from .sections import values_are_right
from .tables import word_for
from .ways import WAYS

Record = dict[str, Any]
Panel = Callable[[list[Record], Axes], None]

COLOURS = {
    "fastinit": "#1f77b4", "fastinit fp32": "#aec7e8", "torch": "#ff7f0e", "torch fp32": "#ffbb78",
    "naive": "#999999", "plain": "#cccccc", "fabric": "#9467bd", "accelerate": "#8c564b", "transformers": "#e377c2",
    "cuRAND": "#2ca02c", "Triton": "#17becf", "JAX threefry": "#d62728", "JAX rbg": "#ff9896", "NumPy": "#bcbd22",
}  # fmt: skip


def save(results: dict[str, Any], path: Path) -> list[Path]:
    """Write a PNG with a panel for each part of the results that has records; for the full suite also the main ones
    of its device side by side. Returns what was written."""
    panels = panels_of(results)
    if not panels:
        return []
    if results["settings"].get("suite") != "full":
        save_column(results, panels, path)
        return [path]
    details = path.with_stem(path.stem + "-details")
    save_column(results, panels, details)
    save_main(results, path)
    return [path, details]


def save_column(results: dict[str, Any], panels: list[tuple[Panel, list[Record]]], path: Path) -> None:
    heights = [max(2.5, 1.2 + 0.24 * len(records)) if panel is plot_creation else 5.0 for panel, records in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(12, sum(heights) + 0.5), squeeze=False, height_ratios=heights
    )
    for (panel, records), axis in zip(panels, axes[:, 0], strict=True):
        panel(records, axis)
    write(figure, results, path)


def save_main(results: dict[str, Any], path: Path) -> None:
    """Fills above; creation, growth and ranks below. A part that was not measured says so."""
    device = results["settings"]["device"]
    figure = pyplot.figure(figsize=(17, 10.5))
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.1))
    for panel, key, title, place in (
        (plot_kernels, "kernels", "Fills", grid[0, :]),
        (plot_creation, "new processes", "Creation", grid[1, 0]),
        (plot_growth, "growth", "Growth", grid[1, 1]),
        (plot_ranks, "ranks", "Ranks", grid[1, 2]),
    ):
        axis = figure.add_subplot(place)
        records = [each for each in results.get(key, []) if each["device"] == device]
        if records:
            panel(records, axis)
        else:
            axis.set_title(f"{title}: not measured", fontsize=10)
            axis.set_axis_off()
    write(figure, results, path)


def write(figure: Figure, results: dict[str, Any], path: Path) -> None:
    inch = 1 / figure.get_size_inches()[1]
    figure.suptitle(machines.summary(results["machine"]), fontsize=9, y=1 - 0.1 * inch)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 * inch))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def panels_of(results: dict[str, Any]) -> list[tuple[Panel, list[Record]]]:
    """The parts of the results that have records, GPU before CPU."""
    kernels, growth, modules = (results.get(key, []) for key in ("kernels", "growth", "modules"))
    panels: list[tuple[Panel, list[Record]]] = [
        *((plot_kernels, of_device(kernels, device)) for device in devices_of(kernels)),
        (plot_creation, results.get("new processes", [])),
        (plot_creation, results.get("models", [])),
        *((plot_creation, of_device(modules, device)) for device in devices_of(modules)),
        *((plot_growth, of_device(growth, device)) for device in devices_of(growth)),
        (plot_ranks, results.get("ranks", [])),
    ]
    return [(panel, records) for panel, records in panels if records]


def of_device(records: list[Record], device: str) -> list[Record]:
    return [record for record in records if record["device"] == device]


def devices_of(records: list[Record]) -> list[str]:
    return [*dict.fromkeys(record["device"] for record in records)]


def plot_kernels(records: list[Record], axis: Axes) -> None:
    """Groups of bars, one for each peer: elements per second. A line where a GPU's memory has its limit."""
    constants = {record["dtype"]: record for record in records if record["distribution"] == "constant"}
    records = [record for record in records if record["distribution"] != "constant"]
    names = [name for name in PEERS if any(name in (*record["seconds"], *record["absent"]) for record in records)]
    width = 0.85 / len(names)
    rates: dict[tuple[int, str], float] = {
        (x, name): record["elements"] / statistics.median(times) / 1e9
        for x, record in enumerate(records)
        for name, times in record["seconds"].items()
    }
    for index, name in enumerate(names):
        centre = (index - (len(names) - 1) / 2) * width
        own = {x: rate for (x, who), rate in rates.items() if who == name}
        right = [values_are_right(records[x], name) for x in own]
        if not own:
            axis.bar(0, 0, label=f"{name}: {word_for(records[0]['absent'][name])}", color=COLOURS[name])
            continue
        axis.bar(
            [x + centre for x in own], list(own.values()), width, label=name, color=COLOURS[name],
            hatch=["" if each else "////" for each in right], edgecolor="white", linewidth=0,
        )  # fmt: skip
        for x, record in enumerate(records):
            if name == "fastinit" and record["ratio"] is not None:
                label = f"{record['ratio']:.1f}x"
                axis.annotate(label, (x + centre, own[x]), ha="center", va="bottom", fontsize=7)
            elif name in record["absent"]:
                label = f" {name}: {word_for(record['absent'][name])}"
                axis.annotate(
                    label, (x + centre, 0), ha="center", va="bottom", fontsize=6, rotation=90, color="#777777"
                )
    for x, record in enumerate(records):
        if record["threads"] is None and record["dtype"] in constants:
            constant = constants[record["dtype"]]
            fastest = min(map(statistics.median, constant["seconds"].values()))
            limit = constant["elements"] / fastest / 1e9
            in_legend: dict[str, Any] = {} if x else {"label": "fastest write of a constant"}
            axis.plot([x - 0.45, x + 0.45], [limit, limit], color="black", linewidth=1, **in_legend)
    labels = [f"{record['distribution']}\n{record['dtype']}".replace(" ", "\n") for record in records]
    if records[0]["threads"] is not None:
        labels = [f"{label}, {record['threads']} thr." for label, record in zip(labels, records, strict=True)]
    axis.set_xticks(range(len(records)), labels, fontsize=7, rotation=0 if len(records) < 13 else 60)
    axis.set_ylabel("1e9 elements per second")
    title = (
        f"Fills of {text.count(records[0]['elements'])} elements on {records[0]['device']}; torch's time / fastinit's"
    )
    if any(not values_are_right(record, name) for record in records for name in record["seconds"]):
        title += "; hatched: the values are wrong"
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8)


def plot_creation(records: list[Record], axis: Axes) -> None:
    """A bar for each way: time until the model is ready, with that time to fastinit's."""
    # Ways that take tens of times as long would leave no room for the bars of the others.
    slow = [each for each in records if each.get("ratio", 0.0) > 20.0]
    shown = [each for each in records if each not in slow]
    values = [milliseconds(each) if "seconds" in each else 0.0 for each in shown]
    axis.barh(range(len(shown)), values, color=[COLOURS.get(each.get("way", ""), "#999999") for each in shown])
    for y, (record, value) in enumerate(zip(shown, values, strict=True)):
        if "seconds" in record:
            note = f" {text.seconds(value / 1e3)}, {record['ratio']:.2f}x{memory_of(record)}"
        else:
            note = f" {word_for(record)}"
        axis.annotate(note, (value, y), va="center", fontsize=7)
    same = {key for key in ("model", "device", "cache") if len({each[key] for each in records}) == 1}
    axis.set_yticks(range(len(shown)), [label_of(each, same) for each in shown], fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.35)
    notes = [f"not drawn: {label_of(each, same)}, {milliseconds(each):.3g} ms, {each['ratio']:.0f}x" for each in slow]
    axis.set_xlabel("\n".join(["milliseconds until the model is ready", *notes]), fontsize=8)
    shared = ", ".join(str(records[0][key]) for key in ("model", "device", "cache") if key in same and records[0][key])
    title = f"Creation in bf16{shared and f' ({shared})'}; time / fastinit's, peak memory beyond the model"
    axis.set_title(title, fontsize=9)


def milliseconds(record: Record) -> float:
    """Time of a creation, of the whole model if only a part was created."""
    seconds: float = statistics.median(record["seconds"]) * record.get("scale", 1.0)
    return seconds * 1e3


def memory_of(record: Record) -> str:
    """Where the model is: the device's peak, on the CPU the growth of the process, beyond the model's tensors."""
    peak = record["host_growth"] if record["device"] == "cpu" else record["device_peak"]
    return "" if peak is None else f", +{text.size(max(peak - record['tensor_bytes'], 0))}"


def label_of(record: Record, without: set[str]) -> str:
    parts = [record[key] for key in ("model", "device", "cache") if key not in without]
    return ", ".join(filter(None, (*parts, record.get("way"))))


def plot_growth(records: list[Record], axis: Axes) -> None:
    """Time by number of parameters, a line for each way."""
    for way in WAYS:
        points = [
            (record["parameters"], milliseconds(record))
            for record in records
            if record.get("way") == way and "seconds" in record
        ]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        absent = [record for record in records if record.get("way") == way and "seconds" not in record]
        label = f"{way} ({word_for(absent[0])})" if absent else way
        if points:
            axis.plot(xs, ys, marker="o", markersize=4, label=label, color=COLOURS[way])
        elif absent:
            axis.plot([], [], linestyle="none", marker="x", label=label, color=COLOURS[way])
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(True, which="major", alpha=0.3)
    axis.set_xlabel("parameters", fontsize=8)
    axis.set_ylabel("milliseconds until the model is ready")
    axis.set_title(f"Growth of a Llama-shaped model in bf16 on {records[0]['device']}", fontsize=10)
    axis.legend(fontsize=8)


def plot_ranks(records: list[Record], axis: Axes) -> None:
    """Stacked bars of one rank's time; its memory as text."""
    xs = range(len(records))
    bottoms = [0.0] * len(records)
    for stage, colour in (("constructor", "#aec7e8"), ("materialize", "#1f77b4")):
        values = [statistics.median(record["seconds"][stage]) * 1e3 for record in records]
        axis.bar(xs, values, 0.6, bottom=bottoms, label=stage, color=colour)
        bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
    for x, (record, top) in enumerate(zip(records, bottoms, strict=True)):
        beyond = "" if record["peak_beyond"] is None else f"\npeak: {text.size(max(record['peak_beyond'], 0))} more"
        axis.annotate(
            f"holds {text.size(record['local_bytes'])}{beyond}", (x, top), ha="center", va="bottom", fontsize=8
        )
    axis.set_xticks(xs, [f"1 of {record['ranks']} ranks" for record in records])
    axis.margins(y=0.2)
    axis.set_ylabel("milliseconds")
    parameters = text.count(records[0]["parameters"])
    axis.set_title(f"What one rank of a {parameters} model takes on {records[0]['device']}, simulated", fontsize=10)
    axis.legend(fontsize=8)
