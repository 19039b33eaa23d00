"""The documentation keeps its word: its Python runs, its links lead somewhere, its tables name what exists.

The ```python blocks of a page run in their order, in one namespace and an empty folder; ```pycon blocks are doctests.
Comments, which no reader of the rendered page sees, help with that:

    <!-- setup                          Python that is run at this place, and not shown
    class AnyModel(...): ...
    -->

    <!-- not run: needs a launcher -->  the next block is compiled and not run
    <!-- benchmarks: ... -->            where benchmarks/report.py writes a table

Pages are written for GPUs. Here "cuda" is read as "cpu".
"""

import ast
import doctest
import gc
import importlib
import importlib.util
import os
import random
import re
import sys
import urllib.parse
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

import fastinit

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *DOCS.glob("*.md"),
        *(ROOT / "examples").glob("*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
    )
)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    kind: str  # "python", "pycon", "setup", or another language
    source: str
    line: int  # of the page, where the source begins
    runs: bool


_BEGIN = re.compile(r"```(\w*)$|<!-- (setup)$|<!-- (not run): \S.* -->$")


def blocks_of(text):
    """The fenced blocks and setups of a page, in order.

    Raises:
        ValueError: a block that does not end, a comment that is nearly one of the above.
    """
    blocks, lines, at, runs = [], text.splitlines(), 0, True
    while at < len(lines):
        match = _BEGIN.fullmatch(lines[at])
        at += 1
        if match is None:
            if lines[at - 1].startswith(("```", "<!--")) and not lines[at - 1].startswith("<!-- benchmarks"):
                raise ValueError(f"line {at}: {lines[at - 1]!r} is not understood")
            continue
        if match[3]:
            runs = False
            continue
        end = "-->" if match[2] else "```"
        if end not in lines[at:]:
            raise ValueError(f"line {at}: this block has no end")
        last = lines.index(end, at)
        blocks.append(Block(match[2] or match[1], "\n".join(lines[at:last]) + "\n", at + 1, runs))
        at, runs = last + 1, True
    return blocks


def prose_of(text):
    """The page without its blocks, comments and inline code; lines keep their numbers."""
    for pattern in (r"^```.*?^```$", r"<!--.*?-->", r"(?<!`)`[^`\n]+`(?!`)"):
        text = re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    return text


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """A folder of its own, and none of what a page leaves behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(functional, "linear", functional.linear)  # DeepSpeed replaces it
    state = torch.random.get_rng_state(), random.getstate()
    with mock.patch.dict(os.environ):
        yield
    torch.random.set_rng_state(state[0])
    random.setstate(state[1])
    if dist.is_initialized():
        dist.destroy_process_group()
    if "fastinit.lightning" in sys.modules:
        sys.modules["fastinit.lightning"].disable()
    # FSDP1's flat parameters hold on to their modules in torch's autograd, which nothing frees.
    gc.collect()


WITH_PYTHON = [path for path in PAGES if {"python", "pycon"} & {each.kind for each in blocks_of(path.read_text())}]


@pytest.mark.filterwarnings("ignore")  # those of torch and of libraries: they differ between versions
@pytest.mark.parametrize("path", [path for path in WITH_PYTHON if path.name != "api.md"], ids=name_of)
def test_the_python_of_a_page_runs(path, clean):
    names = {"__name__": "page"}
    default = torch.get_default_dtype()
    for block in blocks_of(path.read_text()):
        if block.kind == "pycon":
            run_doctest(path, block, names)
        elif block.kind in ("python", "setup"):
            # Its errors have the page's lines.
            source = "\n" * (block.line - 1) + re.sub(r'"cuda(:\d)?"', '"cpu"', block.source)
            code = compile(source, path, "exec")
            if block.runs:
                exec(code, names)
    assert torch.get_default_dtype() == default


def run_doctest(path, block, names):
    names |= {"fastinit": fastinit, "torch": torch}
    test = doctest.DocTestParser().get_doctest(block.source, names, name_of(path), str(path), block.line - 1)
    assert test.examples, f"{name_of(path)}, line {block.line}: a pycon block without >>>"
    report = []
    # The namespace is the page's, so it is not cleared.
    result = doctest.DocTestRunner().run(test, out=report.append, clear_globs=False)
    names.update(test.globs)
    assert not result.failed, "".join(report)


# --- links ------------------------------------------------------------------------------------------------------------


def anchors_of(text):
    """The anchors that GitHub gives to the headings of a page."""
    anchors, counts = set(), {}
    for heading in re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    ):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        count = counts[anchor] = counts.get(anchor, -1) + 1
        anchors.add(f"{anchor}-{count}" if count else anchor)
    return anchors


def broken_links(path):
    """The links of a page that lead nowhere, with their lines; external ones are looked at, not followed."""
    prose = prose_of(path.read_text())
    broken = []
    for match in re.finditer(r"\[[^\]]*\]\(([^)\s]*)\)", prose):
        link = urllib.parse.urlsplit(match[1])
        if link.scheme or link.netloc:
            good = link.scheme == "https" and "." in link.netloc
        else:
            target = (path.parent / link.path).resolve() if link.path else path
            good = target.is_relative_to(ROOT) and target.exists() and bool(link.path or link.fragment)
            if good and link.fragment:
                good = target.suffix == ".md" and link.fragment in anchors_of(target.read_text())
        if not good:
            broken.append(f"{path.name}:{prose[: match.start()].count(chr(10)) + 1}: {match[1]}")
    return broken


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(path):
    assert broken_links(path) == []


def test_links_that_lead_nowhere_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A `heading`, twice\n# A heading, twice\n")
    page = tmp_path / "page.md"
    good = ["other.md", "other.md#a-heading-twice", "other.md#a-heading-twice-1", "#here", "https://pytorch.org/docs"]
    bad = ["none.md", "other.md#a-heading", "#there", "../page.md", "http://pytorch.org", "https://nowhere", ""]
    code = "`[](none.md)`\n```text\n[](none.md)\n```"
    page.write_text("\n".join(["# Here", code, *(f"[]({each})" for each in good + bad)]))
    assert broken_links(page) == [f"page.md:{line}: {each}" for line, each in enumerate(bad, 6 + len(good))]


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[[^\]]+\]\(([\w-]+\.md)\)", index, re.MULTILINE)) == sorted(
        path.name for path in DOCS.glob("*.md") if path.name != "README.md"
    )


# --- what pages name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_tests_that_a_page_names_exist(path):
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", path.read_text()):
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{file} has no {name}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_files_that_a_page_names_exist(path):
    named = re.findall(r"`((?:fastinit|csrc|tests|tools|examples)/[\w/.-]+)`", path.read_text())
    assert [each for each in named if not (ROOT / each).exists()] == []


def test_every_promise_names_a_test():
    page = (DOCS / "guarantees.md").read_text()
    promises = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert len(promises) > 5
    assert [each.splitlines()[0] for each in promises if ".py::test_" not in each] == []


@pytest.fixture(scope="module")
def build_api():
    spec = importlib.util.spec_from_file_location("build_api", DOCS / "build_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_docstrings_give(build_api):
    assert (DOCS / "api.md").read_text() == build_api.page(), "run: python docs/build_api.py"


def test_the_reference_has_every_public_name(build_api):
    listed = {f"{module}.{name}" for module, _, names in build_api.SECTIONS for name in names}
    modules = {"accelerate", "deepspeed", "lightning"}
    public = {f"fastinit.{name}" for name in fastinit.__all__ if name not in modules | {"__version__"}}
    public |= {f"fastinit.{module}.{name}" for module in modules for name in getattr(fastinit, module).__all__}
    assert public <= listed
