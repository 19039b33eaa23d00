"""Writes what the tests of libraries found into docs/conformance.md: `python tests/zoo/libraries/page.py RESULTS.xml`,
where pytest has left its results with --junit-xml."""

import importlib.metadata
import platform
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "conformance.md"
TITLE = "\n## Libraries\n"
PREAMBLE = f"""{TITLE}
Written by `make test-libraries`: small models of other libraries, made of their configuration alone
(`tests/zoo/libraries`) and compared in the same way. Of each mode the number of models that pass. Forward: the
models that are called, too. In fp32, with torch's values, they give torch's results bit for bit; in bf16, where torch's
own model runs, results of the same kind. Fp64: the structure, and what torch computes or fixes in that default dtype.

torchao, optimum-quanto and bitsandbytes quantize a model in the block as they do after it
(`tests/zoo/test_libraries.py::test_a_model_is_quantized_in_the_block_as_after_it`).
"""
MODES = ("device", "bf16", "fp64", "empty", "shard", "load", "forward")


def table(results):
    found, known = {}, []
    for case in ET.parse(results).iter("testcase"):
        test, _, parameters = case.get("name").rstrip("]").partition("[")
        library, name, mode = parameters.split("-", 1)[0], *parameters.split("-", 1)[1].rsplit("-", 1)
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        if test == "test_a_model_is_what_torch_makes":
            found.setdefault(library, {}).setdefault(mode, {})[name] = outcome
            if outcome == "skipped":
                known.append((library, name, mode, case.find("skipped").get("message")))
            elif outcome != "passed":
                known.append((library, name, mode, "fails"))
    lines = ["| | models | " + " | ".join(MODES) + " |", "|---|---|" + "---|" * len(MODES)]
    for library, modes in sorted(found.items()):
        cells = [_passed(modes.get(mode, {})) for mode in MODES]
        lines.append(f"| {library} {version(library)} | {len(modes['device'])} | {' | '.join(cells)} |")
    lines += ["", "What differs, and why:", "", "| | model | mode | reason |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in known]
    lines += ["", "The models:", ""]
    lines += [f"- {library}: {', '.join(modes['device'])}." for library, modes in sorted(found.items())]
    return "\n".join(lines) + "\n"


def _passed(outcomes):
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    return f"{passed} of {len(outcomes)}" if outcomes else ""


def version(library):
    distributions = importlib.metadata.packages_distributions()[library]
    return importlib.metadata.version(distributions[0])


def main():
    (results,) = sys.argv[1:]
    page = PAGE.read_text().partition(TITLE)[0]
    with_versions = f"torch {version('torch')}, Python {platform.python_version()}, CPU."
    PAGE.write_text("\n".join([page + PREAMBLE, with_versions, "", table(results)]))


if __name__ == "__main__":
    main()
