"""Results of benchmarks: JSON as pytest-benchmark writes it, and the tables that it gives.

Each benchmark is of a suite, a case and a way, which its "extra_info" names. Ways of one case are compared. What else
"extra_info" may have: `elements` or `bytes` (its rate is shown), `scale` (only a part was measured: the time is to be
multiplied), `wrong` (the values were not those that were asked for), `beyond` (bytes of memory beyond the model),
`parts` (of the time). "absent" beside "benchmarks" lists what is not there, with a `reason`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from . import text

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Measured:
    """One benchmark; without seconds, why not."""

    suite: str
    case: str
    way: str
    seconds: tuple[float, ...]
    info: dict[str, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) * float(self.info.get("scale", 1.0))

    @property
    def cost(self) -> float:
        """What ways are compared by: seconds, for each element if it is known how many there are."""
        return self.median / float(self.info.get("elements", 1))

    @property
    def spread(self) -> float:
        """Half of the range between the quartiles, of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / statistics.median(self.seconds)


def entry(suite: str, case: str, way: str, seconds: list[float], **info: Any) -> dict[str, Any]:
    """An item of "benchmarks", with what is read of it here and by `pytest-benchmark compare`."""
    stats = {
        "data": seconds, "rounds": len(seconds), "iterations": 1, "min": min(seconds), "max": max(seconds),
        "mean": statistics.mean(seconds), "median": statistics.median(seconds), "stddev": statistics.pstdev(seconds),
    }  # fmt: skip
    name = f"{suite}: {case}, {way}"
    identity = {"suite": suite, "case": case, "way": way}
    return {"group": f"{suite}: {case}", "name": name, "fullname": name, "stats": stats, "extra_info": identity | info}


def read(document: dict[str, Any]) -> list[Measured]:
    measured = []
    for each in (*document["benchmarks"], *document.get("absent", [])):
        info = dict(each.get("extra_info", each))
        seconds = tuple(each["stats"]["data"]) if "stats" in each else ()
        measured.append(Measured(info.pop("suite"), info.pop("case"), info.pop("way"), seconds, info))
    return measured


def grouped(measured: Iterable[Measured], key: Callable[[Measured], Key]) -> dict[Key, list[Measured]]:
    """Those that have a key in common, by it, in the order of the first of each."""
    groups: dict[Key, list[Measured]] = {}
    for each in measured:
        groups.setdefault(key(each), []).append(each)
    return groups


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]

    def show(self) -> None:
        text.show_table(self.header, self.rows, self.title)
        for note in self.notes:
            print(f"  {note}")

    def markdown(self) -> str:
        head = [self.title, *self.header[1:]]
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *self.rows)]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def tables(measured: Iterable[Measured]) -> list[Table]:
    """A row for each case and a column for each way, one table for the cases of a suite that have the same ways; and
    where fastinit's time goes."""
    measured = list(measured)
    groups: dict[tuple[str, frozenset[str]], list[Measured]] = {}
    for (suite, _), of_case in grouped(measured, lambda each: (each.suite, each.case)).items():
        groups.setdefault((suite, frozenset(each.way for each in of_case)), []).extend(of_case)
    of_suites = [suite_table(suite, of_group) for (suite, _), of_group in groups.items()]
    parts = parts_table(measured)
    return [*of_suites, parts] if parts.rows else of_suites


def suite_table(suite: str, measured: list[Measured]) -> Table:
    """Ways that no case has a figure of have no column, and are named below."""
    ways = list(dict.fromkeys(each.way for each in measured if each.seconds))
    notes: dict[str, None] = {}
    rows = []
    for case, of_case in grouped(measured, lambda each: each.case).items():
        of_way = {each.way: each for each in of_case}
        rows.append([case, *(cell(of_way[way], of_way.get("fastinit")) if way in of_way else "" for way in ways)])
        for each in of_way.values():
            if "reason" in each.info:
                notes[f"{each.way}: {each.info['reason']}"] = None
            if each.info.get("wrong"):
                notes[f"! {each.way}, {case}: mean or standard deviation are not those that were asked for"] = None
            if "scale" in each.info:
                notes["~ measured on a part, scaled up"] = None
    return Table(suite, ["", *ways], rows, list(notes))


def cell(each: Measured, base: Measured | None) -> str:
    """The time or the rate with its spread, and the time to fastinit's."""
    if not each.seconds:
        return str(each.info["reason"]).partition(":")[0]
    value = ("~" if "scale" in each.info else "") + text.seconds(each.median)
    if "elements" in each.info:
        value = f"{1e-9 / each.cost:.3g} G/s"
    elif "bytes" in each.info:
        value += f", {each.info['bytes'] / each.median / 1e9:.3g} GB/s"
    if len(each.seconds) > 1:
        value += f" ±{each.spread:.0%}"
    if each.info.get("wrong"):
        value += "!"
    if base is not None and base.seconds and each is not base:
        value += f" ({each.cost / base.cost:.2f}x)"
    return value


def parts_table(measured: list[Measured]) -> Table:
    names = dict.fromkeys(name for each in measured for name in each.info.get("parts", {}))
    rows = []
    for each in measured:
        parts, beyond = each.info.get("parts", {}), each.info.get("beyond")
        if parts or beyond is not None:
            times = [text.seconds(parts[name]) if name in parts else "" for name in names]
            rows.append([f"{each.suite}: {each.case}, {each.way}", *times, "" if beyond is None else text.size(beyond)])
    return Table("Where the time goes, and the peak of memory beyond the model", ["", *names, "memory"], rows, [])
