"""The logger "fastinit": what a block did, and what torch had to run itself."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import fastinit


def model():
    linear = torch.nn.Linear(4, 4)
    linear.register_buffer("angles", torch.outer(torch.arange(4.0), torch.ones(2)).cos().cos())
    return linear


def messages(caplog, level=logging.INFO):
    with caplog.at_level(level, "fastinit"), fastinit.on("cpu", "bf16", seed=0) as init:
        kept = model()
    assert kept.angles.dtype is torch.bfloat16
    return str(init), caplog.messages


def test_a_block_logs_its_report_and_what_torch_ran(caplog):
    report, (first, second) = messages(caplog)
    assert first == report and first.startswith("20 parameters, 40 B in bfloat16 on cpu: 3 fills executed")
    assert second == "torch itself ran aten.cos (2), torch.arange, aten.mul"


def test_a_block_that_torch_had_no_part_in_logs_its_report_alone(caplog):
    with caplog.at_level(logging.INFO, "fastinit"), fastinit.on("cpu", seed=0) as init:
        kept = torch.nn.Linear(4, 4)
    assert kept.weight.is_leaf and caplog.messages == [str(init)]


def test_nothing_is_logged_or_counted_at_the_usual_level(caplog):
    assert messages(caplog, logging.WARNING)[1] == []


def run(level):
    program = "import torch, fastinit\nwith fastinit.on('cpu', seed=0):\n    model = torch.nn.Linear(4, 4)"
    environment = {**os.environ, "FASTINIT_LOG": level}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(("level", "lines"), [("info", 1), ("INFO", 1), ("warning", 0), ("", 0)])
def test_the_environment_sends_it_to_standard_error(level, lines):
    result = run(level)
    assert result.returncode == 0 and result.stdout == ""
    assert [line.startswith("fastinit: 20 parameters, ") for line in result.stderr.splitlines()] == [True] * lines


def test_a_level_that_does_not_exist_is_refused():
    complaint = "FASTINIT_LOG='loud' is not a level; use one of debug, info, warning, error, or unset it"
    assert complaint in run("loud").stderr
