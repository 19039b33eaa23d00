"""Triton's generator as a peer of the benchmarks: fills by tl.rand4x and tl.randn4x, four values a counter."""

# Triton reads annotations of kernels: they have to be objects, not strings.
import torch
import triton
import triton.language as tl

BLOCK = 1024  # counters of one program


@triton.jit
def _uniform(pointer, seed, count, BLOCK: tl.constexpr):
    counters = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = tl.rand4x(seed, counters)
    _store(pointer, count, a * 2 - 1, b * 2 - 1, c * 2 - 1, d * 2 - 1, BLOCK)


@triton.jit
def _normal(pointer, seed, count, std, BLOCK: tl.constexpr):
    counters = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = tl.randn4x(seed, counters)
    _store(pointer, count, a * std, b * std, c * std, d * std, BLOCK)


@triton.jit
def _store(pointer, count, a, b, c, d, BLOCK: tl.constexpr):
    # Each of the four in a run of its own, so that threads side by side write side by side.
    first = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, BLOCK)
    tl.store(pointer + first, a, mask=first < count)
    tl.store(pointer + first + BLOCK, b, mask=first + BLOCK < count)
    tl.store(pointer + first + 2 * BLOCK, c, mask=first + 2 * BLOCK < count)
    tl.store(pointer + first + 3 * BLOCK, d, mask=first + 3 * BLOCK < count)


def fill(tensor: torch.Tensor, distribution: str, std: float) -> None:
    """Fill a contiguous tensor with values in [-1, 1) or normal ones of that standard deviation."""
    grid = (triton.cdiv(tensor.numel(), 4 * BLOCK),)
    if distribution == "uniform":
        _uniform[grid](tensor, 1, tensor.numel(), BLOCK=BLOCK)
    else:
        _normal[grid](tensor, 1, tensor.numel(), std, BLOCK=BLOCK)
