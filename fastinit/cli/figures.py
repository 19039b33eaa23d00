"""The figures that the project holds itself to, read off the results of the full suite, with their goals.

A goal is for the machine that its name says: on another one the figure is there to compare.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import text
from .sections import ratio_of

Results = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and the bound that it should keep, if there is one: at least `goal`, or with `most` at most."""

    name: str
    value: float | None
    goal: float | None
    most: bool = False

    @property
    def kept(self) -> bool | None:
        if self.value is None or self.goal is None:
            return None
        return self.value <= self.goal if self.most else self.value >= self.goal


def table(results: Results) -> str:
    """All that were measured, and which of those that were asked for were not; nothing for other suites."""
    if results["settings"].get("suite") != "full":
        return ""
    rows = []
    for figure in of(results):
        value = "not measured" if figure.value is None else f"{figure.value:.3g}"
        kept = {None: "-", True: "yes", False: "no"}[figure.kept]
        goal = "-" if figure.goal is None else f"{'<=' if figure.most else '>='} {figure.goal:g}"
        rows.append([figure.name, value, goal, kept])
    return text.table(["figure", "measured", "goal", "kept"], rows)


def of(results: Results) -> list[Figure]:
    return [*gpu_fills(results), *cpu_fills(results), *creation(results)]


def gpu_fills(results: Results) -> Iterator[Figure]:
    def fill(distribution: str, dtype: str) -> Record | None:
        return find(results.get("kernels", []), distribution=distribution, dtype=dtype, threads=None)

    def rate(distribution: str, dtype: str, who: str = "fastinit") -> float | None:
        record = fill(distribution, dtype)
        times = record["seconds"].get(who) if record else None
        return record["elements"] / statistics.median(times) if record and times else None

    def floor(dtype: str) -> float | None:
        """The fastest write of a constant by anyone is the nearest to what memory allows that was measured."""
        record = fill("constant", dtype)
        rates = [rate("constant", dtype, name) for name in record["seconds"]] if record else []
        return max((each for each in rates if each), default=None)

    for distribution, dtype, goal in (
        ("uniform", "bf16", 2.05), ("normal", "bf16", 2.4), ("normal", "fp32", 1.9),
    ):  # fmt: skip
        record = fill(distribution, dtype)
        yield Figure(f"GPU {distribution} {dtype}: torch / fastinit", record["ratio"] if record else None, goal)
    for distribution, goal in (("uniform", 0.9), ("normal", 0.8)):
        share = quotient(rate(distribution, "fp32"), floor("fp32"))
        yield Figure(f"GPU {distribution} fp32: rate / fastest write of a constant", share, goal)
    for dtype in ("fp32", "bf16"):
        share = quotient(rate("truncated normal", dtype), rate("normal", dtype))
        yield Figure(f"GPU truncated normal {dtype}: rate / normal's", share, 0.9)
    for record in results.get("layouts", []):
        if record["device"] != "cpu":
            if record["layout"].startswith("rectangle"):
                rate_of = quotient(1.0, record["ratio"])
                yield Figure(f"GPU {record['layout']}, {record['dtype']}: rate / whole tensor's", rate_of, 0.9)
            else:
                yield Figure(
                    f"GPU {record['layout']}, {record['dtype']}: time / one fill's", record["ratio"], 3.0, most=True
                )


CPU_GOALS: dict[str, tuple[tuple[str, float | None, float | None], ...]] = {
    "avx512": (("uniform", 0.42, 8.0), ("normal", 0.8, 4.8)),
    "avx2": (("uniform", None, None), ("normal", None, 2.2)),
}


def cpu_fills(results: Results) -> Iterator[Figure]:
    isa = results["machine"]["cpu_isa"]
    for distribution, nanoseconds, ratio in CPU_GOALS.get(isa, ((name, None, None) for name in ("uniform", "normal"))):
        records = [
            each for each in results.get("kernels", []) if each["threads"] == 1 and each["distribution"] == distribution
        ]
        slowest = max(
            (statistics.median(each["seconds"]["fastinit"]) / each["elements"] * 1e9 for each in records), default=None
        )
        yield Figure(f"one {isa} core, {distribution}, slowest dtype: ns per element", slowest, nanoseconds, most=True)
        least = min((each["ratio"] for each in records if each["ratio"]), default=None)
        yield Figure(f"one {isa} core, {distribution}, least of all dtypes: torch / fastinit", least, ratio)


def creation(results: Results) -> Iterator[Figure]:
    modules = results.get("modules", [])
    for device, where in (("cpu", "CPU"), ("cuda", "GPU")):
        for way, dtype in (("fastinit", "bf16"), ("fastinit fp32", "fp32")):
            value = times_ratio(modules, way, "plain", device, "2,000 x Linear(64, 64)")
            name = f"2,000 x Linear(64, 64) on the {where} in {dtype}: fastinit / plain fp32 without a context"
            yield Figure(name, value, 0.8, most=True)
    value = times_ratio(modules, "torch", "fastinit", "cuda", "5,000 x Linear(64, 64)")
    yield Figure("10,000 tensors in 5,000 modules on the GPU: torch.device / fastinit", value, 3.0)
    for records, cache in ((results.get("new processes", []), "new process"), (results.get("models", []), "cold")):
        for library, goal in (("torch.nn", 0.4), ("transformers", 0.55)):
            value = times_ratio(records, "fastinit", "torch", "cuda", f"Llama 7B, {library}", cache)
            yield Figure(f"6.74B {library} on the GPU, {cache}: fastinit / torch.device", value, goal, most=True)
    growth = results.get("growth", [])
    largest = find(growth, device="cuda", growth=30_000_000_000, way="fastinit")
    seconds = statistics.median(largest["seconds"]) if largest and "seconds" in largest else None
    yield Figure("30B on one GPU: seconds", seconds, None)
    on_cpu = [each for each in growth if each["growth"] == 1_300_000_000]
    yield Figure("1.3B bf16 on the CPU: torch.device / fastinit", times_ratio(on_cpu, "torch", "fastinit", "cpu"), 8.0)


def find(records: list[Record], **wanted: Any) -> Record | None:
    """The first record with those values; a device is wanted by its type."""

    def fits(record: Record) -> bool:
        return all(
            str(record.get(key)).partition(":")[0] == value if key == "device" else record.get(key) == value
            for key, value in wanted.items()
        )

    return next(filter(fits, records), None)


def times_ratio(
    records: list[Record], way: str, other: str, device: str, model: str | None = None, cache: str | None = None
) -> float | None:
    """Median time of one way of creating a model to that of the other."""
    wanted = {key: value for key, value in (("model", model), ("cache", cache)) if value is not None}
    found = [find(records, way=name, device=device, **wanted) for name in (way, other)]
    if any(each is None or "seconds" not in each for each in found):
        return None
    return ratio_of({name: each["seconds"] for name, each in zip((way, other), found, strict=True) if each}, way, other)


def quotient(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None
