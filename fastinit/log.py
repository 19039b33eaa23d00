"""The logger "fastinit": what blocks did, and what torch had to run itself; and how messages list names.

The logger is silent unless the program configures `logging`, or FASTINIT_LOG names a level, from which on its messages
go to standard error.

Private: it may change with any version.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

logger = logging.getLogger("fastinit")

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _log_to_stderr(level: str) -> None:
    if level.lower() not in _LEVELS:
        raise ValueError(f"FASTINIT_LOG={level!r} is not a level; use one of {', '.join(_LEVELS)}, or unset it")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(_LEVELS[level.lower()])


if os.environ.get("FASTINIT_LOG"):
    _log_to_stderr(os.environ["FASTINIT_LOG"])
