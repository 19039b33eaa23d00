"""The compiled module, typed: the only file that touches ``fastinit._native``.

A :class:`Batch` collects fills of raw memory and runs them together; what a fill writes is specified in
docs/stream-v1.md. It works on addresses and sizes and knows nothing of torch: who calls it keeps the memory alive
until the batch has run, and on CUDA until the stream has. The rest is the fast path of fastinit.record: the bases of
its classes, which hold the state that both sides change, and what fastinit.record.methods connects to torch.

Private: it may change with any version.
"""

from __future__ import annotations

try:
    from fastinit._native import *  # noqa: F403
except ImportError as error:
    raise ImportError(
        "fastinit: the native module is not built for this Python; run `pip install .`, or `make build` in a checkout. "
        f"{error}"
    ) from error

# dtypes
FLOAT32, FLOAT16, BFLOAT16 = range(3)
# kinds of distribution, with their parameters
CONSTANT = 0  # (value,)
UNIFORM = 1  # (low, high)
NORMAL = 2  # (mean, std)
TRUNCATED_NORMAL = 3  # (mean, std, threshold, *(offset, scale, low, high) of the negative, then of the positive side)
# steps, as (op, a, b); erfinv takes no operands and ignores them
MULTIPLY, ADD, DIVIDE, CLAMP, ERFINV = range(5)

MAX_STEPS = 6
