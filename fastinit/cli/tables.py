"""The results of a benchmark as tables for the terminal. Who is missing or has failed is named in each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from . import machine as machines
from . import text
from .peers import PEERS
from .sections import ratio_of, values_are_right
from .ways import WAYS

Record = dict[str, Any]


def all_of(results: dict[str, Any]) -> list[str]:
    """One for each part of the results that has records."""
    parts = [
        (kernel_table, "kernels"),
        (layout_table, "layouts"),
        (model_table, "modules"),
        (model_table, "new processes"),
        (model_table, "models"),
        (growth_table, "growth"),
        (rank_table, "ranks"),
        (section_table, "sections"),
    ]
    return [table(results[key]) for table, key in parts if results.get(key)]


def markdown(results: Record) -> str:
    """The main results for a README: rates of fills on the device, and times to create models."""
    device = results["settings"]["device"]
    kernels = [each for each in results.get("kernels", []) if each["device"] == device]
    names = [name for name in PEERS if any(name in (*each["seconds"], *each["absent"]) for each in kernels)]
    parts = [machines.summary(results["machine"])]
    if kernels:
        rows = [
            [f"{each['distribution']} {each['dtype']}{'' if each['threads'] is None else ', ' + where(each)}"]
            + [rate_or_word(each, name) for name in names]
            for each in kernels
        ]
        elements = text.count(kernels[0]["elements"])
        parts.append(text.markdown_table([f"fills of {elements} elements, 1e9 elements per second", *names], rows))
    for key in ("new processes", "growth", "modules"):
        records = [each for each in results.get(key, []) if each["device"] == device and "way" in each]
        ways = [way for way in WAYS if any(each["way"] == way for each in records)]
        models = dict.fromkeys((each["model"], each.get("growth")) for each in records)
        rows = []
        for model, size in models:
            of_model = {each["way"]: each for each in records if (each["model"], each.get("growth")) == (model, size)}
            label = model if size is None else f"{model}, {text.count(size)}"
            rows.append([label, *(time_or_word(of_model.get(way, {})) for way in ways)])
        if rows:
            cache = {"new processes": ", new process", "growth": ", empty cache"}.get(key, "")
            parts.append(text.markdown_table([f"creation in bf16 on {device}{cache}", *ways], rows))
    return "\n\n".join(parts) + "\n"


def rate_or_word(record: Record, name: str) -> str:
    if name not in record["seconds"]:
        return word_for(record["absent"].get(name, {}))
    rate = record["elements"] / median(record["seconds"][name]) / 1e9
    return (f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}") + (
        "" if values_are_right(record, name) else " (wrong values)"
    )


def time_or_word(record: Record) -> str:
    if "seconds" not in record:
        return word_for(record)
    scale = record.get("scale", 1.0)
    return ("~" if scale > 1.001 else "") + text.seconds(median(record["seconds"]) * scale)


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def reason(record: Record) -> str | None:
    """Why there is no time in a record, in a few words; None if there is one."""
    if "missing" in record:
        return f"{record['missing']} is not installed"
    if "unsupported" in record:
        unsupported: str = record["unsupported"]
        return unsupported
    if "error" in record:
        return f"failed: {record['error'].splitlines()[-1][:160]}"
    return None


def word_for(record: Record) -> str:
    return next((word for word in ("missing", "unsupported", "error") if word in record), "-")


def kernel_table(records: list[Record]) -> str:
    names = [name for name in PEERS if any(name in (*record["seconds"], *record["absent"]) for record in records)]
    others = [name for name in names if name != "fastinit"]
    header = ["fill", "dtype", "where", "elements", "fastinit ns/el", "torch ns/el"]
    header += [f"{name} / fastinit" for name in others]
    rows = []
    notes: dict[str, None] = {}
    for record in records:
        cells = [record["distribution"], record["dtype"], where(record), text.count(record["elements"])]
        for name in ("fastinit", "torch"):
            times = record["seconds"].get(name)
            cells.append("-" if times is None else f"{median(times) / record['elements'] * 1e9:.3g}")
        for name in others:
            ratio = ratio_of(record["seconds"], name)
            absent = record["absent"].get(name, {})
            if absent:
                notes[f"{name}: {reason(absent)}"] = None
            if ratio is None:
                cells.append(word_for(absent))
            elif values_are_right(record, name):
                cells.append(f"{ratio:.2f}")
            else:
                cells.append(f"{ratio:.2f}!")
                values = record["values"][name]
                notes[
                    f"! {name}'s {record['distribution']} {record['dtype']} has mean {values['mean']:.3g} and standard "
                    f"deviation {values['std']:.3g}, which were not asked for"
                ] = None
        rows.append(cells)
    repeats = max(len(times) for record in records for times in record["seconds"].values())
    return "\n\n".join(filter(None, [f"Fills, medians of {repeats}:", text.table(header, rows), "\n".join(notes)]))


def where(record: Record) -> str:
    if record["threads"] is None:
        return "GPU"
    return f"{record['threads']} thread" + ("s" if record["threads"] > 1 else "")


def layout_table(records: list[Record]) -> str:
    header = ["normal fills in another layout", "dtype", "device", "as one tensor", "so", "time ratio"]
    rows = [
        [
            record["layout"],
            record["dtype"],
            record["device"],
            *(text.seconds(median(record["seconds"][name])) for name in ("one", "parts")),
            f"{record['ratio']:.2f}",
        ]
        for record in records
    ]
    return text.table(header, rows)


def model_table(records: list[Record]) -> str:
    header = ["model", "device", "cache", "way", "parameters", "repeats", "time", "way / fastinit"]
    header += ["host growth", "device peak - model", "unused"]
    rows = []
    notes: dict[str, None] = {}
    for record in records:
        identity = [record["model"], record["device"], record["cache"] or "-"]
        if "seconds" not in record:
            note = f"{record.get('way', record['model'])}: {reason(record)}"
            notes[note] = None
            cells = [record.get("way", "-"), "-", "-", word_for(record)]
            rows.append([*identity, *cells, *["-"] * (len(header) - len(identity) - len(cells))])
            continue
        scale = record.get("scale", 1.0)
        mark = "~" if scale > 1.001 else ""
        peak = record["device_peak"]
        rows.append(
            [
                *identity,
                record["way"],
                text.count(record["parameters"]),
                str(len(record["seconds"])),
                mark + text.seconds(median(record["seconds"]) * scale),
                f"{mark}{record['ratio']:.3g}" if "ratio" in record else "-",
                size_or_dash(record["host_growth"]),
                size_or_dash(None if peak is None else peak - record["tensor_bytes"]),
                size_or_dash(record["device_unused"]),
            ]
        )
    if any(cell.startswith("~") for row in rows for cell in row):
        notes["~ measured on the number of parameters shown, scaled up to fastinit's"] = None
    splits = split_table(records)
    parts = ["Creation of models in bf16, medians:", text.table(header, rows), "\n".join(notes), splits]
    return "\n\n".join(filter(None, parts))


def split_table(records: Iterable[Record]) -> str:
    """Where fastinit's time goes, for those records of it that tell; else nothing."""
    split = [record for record in records if record.get("split")]
    if not split:
        return ""
    names = list(split[0]["split"])
    header = ["fastinit's time", "device", "cache", "way", *(name.removeprefix("seconds_") for name in names)]
    rows = [
        [record["model"], record["device"], record["cache"] or "-", record["way"]]
        + [text.seconds(record["split"][name]) for name in names]
        for record in split
    ]
    return text.table(header, rows)


def growth_table(records: list[Record]) -> str:
    ways = [way for way in WAYS if any(record.get("way") == way for record in records)]
    rows = []
    notes: dict[str, None] = {}
    sizes = dict.fromkeys((record["device"], record["growth"]) for record in records)
    for device, size in sizes:
        of_size = {r["way"]: r for r in records if (r["device"], r["growth"]) == (device, size)}
        parameters = next((each["parameters"] for each in of_size.values() if "parameters" in each), size)
        cells = [text.count(parameters), device]
        for way in ways:
            record = of_size.get(way, {})
            if "seconds" in record:
                ratio = f" ({record['ratio']:.2f})" if "ratio" in record and way != "fastinit" else ""
                cells.append(text.seconds(median(record["seconds"])) + ratio)
            else:
                cells.append(word_for(record))
                if record:
                    notes[f"{way}: {reason(record)}"] = None
        rows.append(cells)
    table = text.table(["parameters", "device", *ways], rows)
    title = "Growth of a Llama-shaped model in bf16, time (and ratio to fastinit's):"
    return "\n\n".join(filter(None, [title, table, "\n".join(notes)]))


def rank_table(records: list[Record]) -> str:
    header = ["ranks", "device", "constructor", "materialize", "the rank's bytes", "peak beyond them"]
    rows = [
        [
            str(record["ranks"]),
            record["device"],
            *(text.seconds(median(record["seconds"][stage])) for stage in ("constructor", "materialize")),
            text.size(record["local_bytes"]),
            size_or_dash(record["peak_beyond"]),
        ]
        for record in records
    ]
    parameters = text.count(records[0]["parameters"])
    title = f"One rank of a model of {parameters} parameters in bf16, simulated in one process:"
    return f"{title}\n\n{text.table(header, rows)}"


def section_table(sections: list[Record]) -> str:
    rows = [
        [each["section"], each["device"], text.seconds(each.get("seconds", 0.0)), each.get("error", "done")]
        for each in sections
    ]
    return text.table(["section", "device", "took", "ended"], rows)


def size_or_dash(nbytes: int | None) -> str:
    return "-" if nbytes is None else text.size(nbytes)
