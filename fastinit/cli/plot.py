"""The picture of a benchmark's results."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

from matplotlib import pyplot

from . import machine as machines

COLOURS = {"fastinit": "#1f77b4", "torch": "#ff7f0e", "torch fp32": "#ffbb78", "naive": "#999999"}


def save(results: dict[str, Any], path: Path) -> None:
    """Write a PNG: above, elements per second of each fill; below, the time to create each model."""
    panels = [panel for panel in (plot_kernels, plot_models) if results[panel.__name__.removeprefix("plot_")]]
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(11, 5.5 * len(panels)), squeeze=False)
    for panel, axis in zip(panels, axes[:, 0], strict=True):
        panel(results, axis)
    figure.suptitle(machines.summary(results["machine"]), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_kernels(results: dict[str, Any], axis) -> None:
    records = results["kernels"]
    for offset, name in ((-0.2, "fastinit"), (0.2, "torch")):
        rates = [record["elements"] / statistics.median(record["seconds"][name]) / 1e9 for record in records]
        axis.bar([x + offset for x in range(len(records))], rates, 0.4, label=name, color=COLOURS[name])
        if name == "fastinit":
            for x, (rate, record) in enumerate(zip(rates, records, strict=True)):
                axis.annotate(f"{record['ratio']:.1f}x", (x + offset, rate), ha="center", va="bottom", fontsize=8)
    labels = [f"{record['distribution']}\n{record['dtype']}".replace(" ", "\n") for record in records]
    if records[0]["threads"] is not None:
        labels = [f"{label}, {record['threads']} thr." for label, record in zip(labels, records, strict=True)]
    axis.set_xticks(range(len(records)), labels, fontsize=7, rotation=0 if len(records) < 12 else 60)
    axis.set_ylabel("1e9 elements per second")
    axis.set_title(f"Fills of {records[0]['elements']:,} elements on {results['settings']['device']}")
    axis.legend()


def plot_models(results: dict[str, Any], axis) -> None:
    records = [record for record in results["models"] if "seconds" in record]
    milliseconds = [statistics.median(record["seconds"]) * record["scale"] * 1e3 for record in records]
    axis.barh(range(len(records)), milliseconds, color=[COLOURS[record["way"]] for record in records])
    for y, (record, value) in enumerate(zip(records, milliseconds, strict=True)):
        scaled = " (scaled)" if record["scale"] > 1.001 else ""
        axis.annotate(f" {value:.3g} ms, {record['ratio']:.2f}x{scaled}", (value, y), va="center", fontsize=7)
    labels = [
        ", ".join(filter(None, (record["model"], record["cache"] and f"{record['cache']} cache", record["way"])))
        for record in records
    ]
    axis.set_yticks(range(len(records)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.margins(x=0.2)
    axis.set_xlabel("milliseconds until the model is ready")
    axis.set_title(f"Creation in bf16 on {results['settings']['device']}")
