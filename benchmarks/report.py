"""Tables, goals and a picture of a run of the suites.

    python benchmarks/report.py FILE.json [MORE.json ...] [--readme README.md]

Prints the tables; writes them beside the file as Markdown, and the picture as PNG: of several, which are parts of one
run on one machine, as benchmarks.md and benchmarks.png. With --readme, the table of the README between its markers
becomes that of this run.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastinit.cli import machine, results, text
from fastinit.cli.results import Measured, Table

PICTURED = ("fills", "first", "growth")  # in the picture, if they were measured
README_SUITE = "first"
MARKERS = ("<!-- benchmarks: written by benchmarks/report.py -->", "<!-- benchmarks end -->")

Name = tuple[str, str, str]  # suite, how the case begins and what else it has, way


Goal = tuple[str, Name, Name | None, float, str]  # what, above, below, bound, "<=" or ">="


def goals() -> Iterable[Goal]:
    """Quotients of two costs (without `below` the cost itself, in seconds) that the project holds itself to."""
    for distribution, dtype, bound in (("uniform", "bf16", 2.05), ("normal", "bf16", 2.1), ("normal", "fp32", 1.9)):
        case = f"{distribution} {dtype}, cuda"
        yield f"{case}: torch / fastinit", ("fills", case, "torch"), ("fills", case, "fastinit"), bound, ">="
    for distribution, bound in (("uniform", 0.9), ("normal", 0.8)):
        floor, fill = (("fills", f"{name} fp32, cuda", "fastinit") for name in ("constant", distribution))
        yield f"{distribution} fp32, cuda: rate / a constant's", floor, fill, bound, ">="
    for layout, bound in (
        ("rows of 1 KiB", 0.9), ("box of three dimensions", 0.85), ("limits unlike", 0.8), ("one step", 0.85),
    ):  # fmt: skip
        for dtype in ("fp32", "bf16"):
            above, below = (("layouts", f"{name}, cuda", dtype) for name in ("one tensor", layout))
            yield f"{layout}, {dtype}, cuda: rate / a whole tensor's", above, below, bound, ">="
    for dtype in ("fp32", "bf16"):
        many, one = (("layouts", f"{name}, cuda", dtype) for name in ("many at once", "one of as many elements"))
        yield f"10,000 fills of 4,096, {dtype}, cuda: time / one fill's", many, one, 3.0, "<="
    for distribution, bound in (("uniform", 8.0), ("normal", 4.8)):
        for dtype in ("fp32", "fp16", "bf16"):
            case = f"{distribution} {dtype}, cpu, one thread"
            yield f"{case}: torch / fastinit", ("fills", case, "torch"), ("fills", case, "fastinit"), bound, ">="
    for suite, case, other, bound in (
        ("first", "Llama-shaped, 6.74B, torch.nn", "torch", 0.35),
        ("first", "Llama-shaped, 6.74B, transformers", "torch", 0.35),
        ("creation", "Llama, 6.74B, torch.nn, cuda, cold", "torch", 0.4),
        ("creation", "Llama, 6.74B, transformers, cuda, cold", "torch", 0.6),
        ("creation", "Llama-shaped, 10M, cuda", "torch", 1.0),
        ("creation", "2,000 x Linear(64, 64), cuda", "torch", 0.7),
        ("creation", "2,000 x Linear(64, 64), cpu", "torch", 0.7),
        ("creation", "2,000 x Linear(64, 64), cpu", "plain fp32", 1.05),
        ("growth", "1.3B, cpu", "torch", 0.125),
    ):
        yield f"{suite}: {case}: fastinit / {other}", (suite, case, "fastinit"), (suite, case, other), bound, "<="
    for block, bound in (("10,000 classes more", 2e-4), ("transformers", 1.5e-4)):
        name = ("contexts", f"an empty block, {block}", "about the thousandth")
        yield f"{name[1]}: seconds", name, None, bound, "<="


def cost_of(measured: list[Measured], name: Name) -> float | None:
    suite, case, way = name
    found = (each for each in measured if (each.suite, each.way) == (suite, way) and each.case.startswith(case))
    return next((each.cost for each in found if each.seconds), None)


def goals_table(measured: list[Measured]) -> Table:
    rows = []
    for what, above, below, bound, relation in goals():
        costs = cost_of(measured, above), 1.0 if below is None else cost_of(measured, below)
        shown, kept = "not measured", ""
        if None not in costs:
            value = costs[0] / costs[1]
            shown, kept = f"{value:.3g}", "yes" if (value <= bound if relation == "<=" else value >= bound) else "no"
        rows.append([what, shown, f"{relation} {bound:g}", kept])
    return Table("goals, set for one H200", ["", "measured", "goal", "kept"], rows, [])


def beyond_table(measured: list[Measured]) -> Table:
    """What fastinit needs beyond a rank's own memory: at most 64 MiB."""
    rows = [
        [each.case, text.size(each.info["beyond"]), "yes" if each.info["beyond"] <= 64 << 20 else "no"]
        for each in measured
        if each.suite == "sharded" and each.way == "fastinit" and "beyond" in each.info
    ]
    return Table("peak of memory beyond a rank's own, at most 64 MiB", ["", "peak", "kept"], rows, [])


def readme_table(document: dict[str, Any], measured: list[Measured]) -> str:
    table = results.suite_table(README_SUITE, [each for each in measured if each.suite == README_SUITE])
    return f"{table.markdown()}\n\n{about(document)}"


def about(document: dict[str, Any]) -> str:
    described = document["machine_info"]["fastinit"]
    commit = (described["git_commit"] or "unknown")[:9]
    driver = f", driver {described['driver']}" if described["driver"] else ""
    return f"{machine.summary(described)}{driver}, commit {commit}, {document['datetime'][:10]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--readme", type=Path, help="a page with the markers, whose table is to be that of this run")
    arguments = parser.parse_args()
    documents = [json.loads(file.read_text()) for file in arguments.files]
    document = documents[0]
    measured = [each for document in documents for each in results.read(document)]
    file = arguments.files[0]
    stem = file.with_suffix("") if len(documents) == 1 else file.with_name("benchmarks")
    tables = [*results.tables(measured), beyond_table(measured), goals_table(measured)]
    print(about(document))
    for table in filter(lambda table: table.rows, tables):
        table.show()
    if not_started := sum(len(document.get("not_started", [])) for document in documents):
        print(f"Not started, for want of time: {not_started} figures")
    written = "\n\n".join([about(document), *(table.markdown() for table in tables if table.rows)])
    stem.with_suffix(".md").write_text(written + "\n")
    if arguments.readme is not None:
        first, last = MARKERS
        table = f"{first}\n\n{readme_table(document, measured)}\n\n{last}"
        page, found = re.subn(f"{first}.*{last}", lambda _: table, arguments.readme.read_text(), flags=re.DOTALL)
        if not found:
            raise SystemExit(f"--readme {arguments.readme}: put the lines {first} and {last} where it may write")
        arguments.readme.write_text(page)
    try:
        from fastinit.cli import plot
    except ImportError as error:
        print(f"No picture: {error}")
        return
    pictured = [each for each in measured if each.suite in PICTURED] or measured
    plot.save(pictured, stem.with_suffix(".png"), about(document))


if __name__ == "__main__":
    main()
