"""The command line, `python -m fastinit doctor|demo|inspect|bench`, or `fastinit ...`."""

from __future__ import annotations

import argparse
import sys

from . import __version__
from .cli import bench, demo, doctor, inspect


def main(argv: list[str] | None = None) -> int:
    description = (sys.modules["fastinit"].__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m fastinit", description=description)
    parser.add_argument("--version", action="version", version=f"torch-fastinit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="doctor|demo|inspect|bench")
    for command in (doctor, demo, inspect, bench):
        name = command.__name__.rpartition(".")[2]
        description = (command.__doc__ or "").strip()
        subparser = commands.add_parser(name, help=description.splitlines()[0], description=description)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except (ValueError, RuntimeError) as error:
        print(f"python -m fastinit {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
