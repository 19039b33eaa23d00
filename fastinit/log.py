"""The logger "fastinit": what blocks did, and what torch had to run itself.

It is silent unless the program configures `logging`, or FASTINIT_LOG names a level, from which on its messages go to
standard error.

Private: it may change with any version.
"""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("fastinit")

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def _log_to_stderr(level: str) -> None:
    if level.lower() not in _LEVELS:
        raise ValueError(f"FASTINIT_LOG={level!r} is not a level; use one of {', '.join(_LEVELS)}, or unset it")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(_LEVELS[level.lower()])


if os.environ.get("FASTINIT_LOG"):
    _log_to_stderr(os.environ["FASTINIT_LOG"])
