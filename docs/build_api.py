"""Writes docs/api.md, the reference of all public names, from their docstrings: `python docs/build_api.py`.

The docstrings are the source. tests/cli/test_docs.py fails if the page is not what they give.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "api.md"

# Module, heading, and its names in the order of the page; together they are all that is public.
SECTIONS = [
    ("fastinit", "Creating models", ["on", "Report", "TensorReport", "FillReport", "uninstall"]),
    ("fastinit", "Checkpoints", ["load", "LoadReport", "CheckpointError", "uninitialized", "initialize"]),
    ("fastinit", "Shards", ["materialize", "param_init_fn"]),
    ("fastinit.deepspeed", "DeepSpeed", ["zero3"]),
    ("fastinit.accelerate", "Accelerate", ["prepare"]),
    ("fastinit.lightning", "Lightning", ["enable", "disable", "enabled", "FastInit"]),
    ("fastinit", "Fills", ["fill_", "empty", "Normal", "Uniform", "TruncatedNormal", "Constant", "Window"]),
]

INTRODUCTION = """\
# API reference

All public names, from their docstrings. `docs/build_api.py` writes this page: change the docstrings, not the page.
"""

# Sections of a docstring that list items, as "name: text".
_LISTS = ("Args", "Attributes", "Raises")
_HEADING = re.compile(r"(Args|Attributes|Raises|Returns|Example):")
_ITEM = re.compile(r"([A-Za-z_][\w., *]*?): (.*)")


def page() -> str:
    """The whole page, as Markdown."""
    contents, entries = [], []
    for module, heading, names in SECTIONS:
        contents.append(f"- {heading}: " + ", ".join(f"[`{_shown(module, name)}`](#{name.lower()})" for name in names))
        entries.append(f"## {heading}\n")
        entries += [_entry(module, name) for name in names]
    return "\n".join([INTRODUCTION, *contents, "", *entries]).rstrip() + "\n"


def _shown(module: str, name: str) -> str:
    return f"{module}.{name}"


def _entry(module: str, name: str) -> str:
    what = getattr(importlib.import_module(module), name)
    lines = [f"### {name}", "", "```text", _declaration(module, name, what), "```", "", *_body(what.__doc__)]
    if inspect.isclass(what):
        for method, function in vars(what).items():
            if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                shown = f"{name}.{method}"
                lines += [f"**`{shown}{_signature(function)}`**", "", *_body(function.__doc__)]
    return "\n".join(lines)


def _declaration(module: str, name: str, what: Any) -> str:
    shown = _shown(module, name)
    if not inspect.isclass(what):
        return f"def {shown}{_signature(what)}"
    if issubclass(what, Exception):
        return f"class {shown}({what.__mro__[1].__name__})"
    if "Attributes:" in what.__doc__:
        return f"class {shown}"  # fastinit makes these, or fills them
    return f"class {shown}{_signature(what)}"


def _signature(what: Any) -> str:
    """Parameters and result, on a line of their own each if that makes too long a line."""
    signature = inspect.signature(what)
    parameters: list[str] = []
    starred = False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parameters.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        if parameter.annotation is parameter.empty:
            parameters.append(str(parameter))
            continue
        # The annotation is a string, because of the __future__ import: without its quotes.
        name = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parameters.append(f"{name}: {parameter.annotation}{default}")
    returned = inspect.isclass(what) or signature.return_annotation is signature.empty
    result = "" if returned else f" -> {signature.return_annotation}"
    line = f"({', '.join(parameters)}){result}"
    if len(line) <= 90:
        return line
    return "(\n" + "".join(f"    {each},\n" for each in parameters) + f"){result}"


def _body(docstring: str | None) -> list[str]:
    """The lines of a docstring as Markdown."""
    written: list[str] = []
    heading, block = "", []
    for line in [*inspect.cleandoc(docstring or "").splitlines(), "End:"]:
        match = _HEADING.fullmatch(line)
        if match is None and line != "End:":
            block.append(line)
            continue
        written += _section(heading, inspect.cleandoc("\n" + "\n".join(block)).splitlines())
        heading, block = match.group(1) if match else "", []
    return written


def _section(heading: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    if heading == "Example":
        return ["**Example**", "", "```pycon", *lines, "```", ""]
    title = [f"**{heading}**", ""] if heading else []
    if heading not in _LISTS:
        return [*title, *map(_inline, lines), ""]
    items: list[str] = []
    for line in lines:
        match = _ITEM.fullmatch(line)
        if match and not line.startswith(" "):
            names = ", ".join(f"`{each}`" for each in match.group(1).split(", "))
            items.append(f"- {names}: {_inline(match.group(2))}")
        else:
            items.append(f"  {_inline(line.strip())}".rstrip())
    return [*title, *items, ""]


def _inline(text: str) -> str:
    """Single backquotes, and links to the other pages."""
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text.replace("``", "`"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
