"""That benchmarks/stream_statistics.py knows the law of the stream, and finds what is wrong with a sample."""

import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from models import same_bits
from scipy import stats

import fastinit


def script(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stream_bits, stream_statistics = script("stream_bits"), script("stream_statistics")

CPU = torch.device("cpu")
CASES = {f"{case.name} {stream_statistics.short(case.dtype)}": case for case in stream_statistics.CASES}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SAMPLES = 2**19


@functools.cache
def law_of(case):
    return stream_statistics.law_of(case, CPU, SAMPLES)


def examine(case, draw):
    return stream_statistics.examine(case, draw, SAMPLES, law_of(case))


@over_cases
def test_its_law_makes_of_words_what_a_fill_does(case):
    count = 200_000
    words = reference.words(7, 3, np.arange(count)).view(np.int32)
    expected = fastinit.fill_(torch.empty(count, dtype=case.dtype), case.distribution, seed=7, stream=3)
    law = case.values_of(torch.from_numpy(words), stream_statistics.read_table())
    assert same_bits(law, expected)


@over_cases
def test_samples_of_the_stream_pass(case):
    result = examine(case, stream_statistics.writer(case))
    assert result["samples"] == SAMPLES
    assert stream_statistics.verdict([result])["passed"], result["p"]


def shifted(x, seed, stream):
    x += 0.01


def with_a_gap(x, seed, stream):
    x[(x > 0.5) & (x < 0.51)] += 0.01


def clipped(x, seed, stream):
    x.clamp_(-4, 4)


def coarse(x, seed, stream):
    x.copy_((x * 2**12).round() / 2**12)


def repeated(x, seed, stream):
    x[5::8] = x[0::8]


def inverted(x, seed, stream):
    # Each marginal law stays; neighbours have the same magnitude.
    x[3::4] = -x[2::4]


def wide_where_the_last_was_wide(x, seed, stream):
    signs = torch.sign(x[1::16])
    x[1::16] = x[0::16].abs() * signs


FAULTS = {
    "moment 1": shifted,
    "cells": with_a_gap,
    "beyond 4": clipped,
    "mantissa": coarse,
    "correlation of x, lag 5": repeated,
    "quadruples of neighbours": inverted,
    "correlation of x^2, lag 1": wide_where_the_last_was_wide,
}


@pytest.mark.parametrize(("found_by", "fault"), FAULTS.items(), ids=FAULTS)
def test_a_fault_is_found(found_by, fault):
    case = CASES["normal fp32"]
    draw = stream_statistics.writer(case)

    def faulty(out, seed, stream):
        draw(out, seed, stream)
        fault(out, seed, stream)

    result = examine(case, faulty)
    verdict = stream_statistics.verdict([result])
    assert not verdict["passed"]
    assert result["p"][found_by] < verdict["limit"]


def test_cells_that_no_value_reaches_are_pooled_with_others_or_refused():
    probabilities = np.array([0.0, 0.0, 0.25, 0.0, 0.25, 0.5, 0.0])
    counts = torch.tensor([0, 0, 260, 0, 240, 500, 0])
    # By hand: (10^2 / 250 + 10^2 / 250 + 0) = 0.8 with 2 degrees of freedom, of which exp(-0.4) is the tail.
    assert stream_statistics.chi_square(counts, probabilities) == pytest.approx(np.exp(-0.4))
    counts[0] = 1
    assert stream_statistics.chi_square(counts, probabilities) == 0.0


def test_a_p_value_that_could_not_be_computed_is_no_pass():
    result = {"case": "normal", "dtype": "fp32", "p": {"cells": 0.5, "moment 1": float("nan"), "moment 2": 0.4}}
    assert not stream_statistics.verdict([result])["passed"]


def test_the_bits_of_normals_are_their_cells_of_equal_probability():
    x = fastinit.fill_(torch.empty(100_000), fastinit.Normal(0.0, 1.0), seed=5, stream=2)
    edges = torch.from_numpy(stats.norm.ppf(np.arange(1, 256) / 256))
    assert torch.equal(stream_bits.cells_of(x).int(), torch.bucketize(x.double(), edges, right=True, out_int32=True))


@pytest.mark.parametrize("same", ["stream", "seed"])
def test_streams_and_seeds_that_are_alike_are_found(same):
    case = CASES["normal fp32"]
    draw = stream_statistics.writer(case)

    def faulty(out, seed, stream):
        draw(out, *((seed, 0) if same == "stream" else (0, stream)))

    result = examine(case, faulty)
    assert result["p"][f"correlation of x, the next {same}"] == 0.0
