"""Writes what fills of stream v1 gave as random bits to stdout, without end: input for test batteries.

    python benchmarks/stream_bits.py normal | RNG_test stdin8 -tlmax 128GB        # PractRand
    python benchmarks/stream_bits.py uniform | RNG_test stdin16 -tlmax 128GB

A uniform float32 gives its first 16 bits, a normal one 8: the number of the cell, of 256 that are equally likely, in
which it lies. (More bits of a normal would show the batteries that a float32 is rounded.) Each stream gives 2^20
elements; the next one follows.
"""

from __future__ import annotations

import argparse
import functools
import sys
from itertools import count
from statistics import NormalDist

import torch

import fastinit

SEED = 20_261_123
ELEMENTS = 2**20
# The cells' edges are further apart than 1 / PER_UNIT, so that a step of this width has one edge at most.
PER_UNIT = 256
FURTHEST = 7  # no normal of stream v1 lies beyond


@functools.cache
def normal_cells() -> tuple[torch.Tensor, torch.Tensor]:
    """For each step: the cell in which it begins, and the edge at which the next cell does."""
    edges = torch.tensor([NormalDist().inv_cdf(cell / 256) for cell in range(1, 256)], dtype=torch.float64)
    begin = torch.arange(-FURTHEST * PER_UNIT, FURTHEST * PER_UNIT, dtype=torch.float64) / PER_UNIT
    cell = torch.bucketize(begin, edges, right=True)
    edge = torch.cat([edges, torch.tensor([torch.inf])])[cell]
    return cell.to(torch.uint8), edge.float()


def cells_of(normals: torch.Tensor) -> torch.Tensor:
    cells, edges = normal_cells()
    step = (normals * PER_UNIT).floor_().long().add_(FURTHEST * PER_UNIT)
    return cells.take(step) + (normals >= edges.take(step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("distribution", choices=["uniform", "normal"])
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    x = torch.empty(ELEMENTS)
    for stream in count():
        if args.distribution == "uniform":
            fastinit.fill_(x, fastinit.Uniform(0.0, 1.0), seed=args.seed, stream=stream)
            bits = x.mul_(2**16).int().to(torch.uint16)
        else:
            fastinit.fill_(x, fastinit.Normal(0.0, 1.0), seed=args.seed, stream=stream)
            bits = cells_of(x)
        try:
            sys.stdout.buffer.write(bits.numpy().data)
        except BrokenPipeError:  # the battery has seen enough
            sys.exit()


if __name__ == "__main__":
    main()
