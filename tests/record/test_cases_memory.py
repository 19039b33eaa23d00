"""Large parameters that the constructor reads, and parameters that nobody writes, however they were made."""

import ctypes
import json
import re
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from cases import inside, over_dtypes, quiet
from models import DTYPES, plain
from torch import nn

import fastinit

# Each program returns what stays; the kernel is told to count the peak anew before each.
PEAKS = """
import ctypes, json, sys, torch, fastinit
from torch import nn

dtype = sys.argv[1]
ITEM = {"fp32": 4, "bf16": 2}[dtype]

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def rows(mib):
    return mib * (1 << 20) // ITEM // 1024

def normal(mib):
    return nn.init.normal_(nn.Parameter(torch.empty(rows(mib), 1024)))

def held(read):
    def program(mib):
        w = normal(mib)
        return w, read(w.detach())
    return program

@torch.no_grad()
def scaled(mib):
    w = normal(mib)
    return w.div_(w.norm())

PROGRAMS = {
    "norm": held(lambda w: w.norm()),
    "largest": held(lambda w: (w.max().item(), w.min().item())),
    "a sum over rows": held(lambda w: w.sum(0)),
    "a row": held(lambda w: w[5] * 2),
    "a product": held(lambda w: torch.ones(1, 1024) @ w[:1024].t()),
    "scaled": scaled,
    "of a layer": lambda mib: nn.Linear(1024, rows(mib)),
}
with fastinit.on("cpu", dtype, seed=0):
    for program in PROGRAMS.values():
        program(1)  # what is loaded at first
peaks = {}
for name, mib in [(name, 64) for name in PROGRAMS] + [("norm", 256)] * (dtype == "bf16"):
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and stayed would hide a part of the peak
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    with fastinit.on("cpu", dtype, seed=0):
        kept = PROGRAMS[name](mib)
    peaks[f"{name} of {mib} MiB"] = (status("VmHWM") - before) / (1 << 20)
    del kept
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def peaks():
    """Return a function that gives the peak of each program in MiB, measured in a process of its own."""
    measured = {}

    def measure(dtype):
        if dtype not in measured:
            command = [sys.executable, "-c", PEAKS, dtype]
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert result.returncode == 0, result.stderr
            measured[dtype] = json.loads(result.stdout)
        return measured[dtype]

    return measure


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads and resets peaks in /proc")


@linux
def test_a_parameter_that_the_constructor_reads_once_takes_the_models_memory(peaks):
    assert 250 < peaks("bf16")["norm of 256 MiB"] < 350


@linux
@over_dtypes
def test_whatever_reads_a_large_parameter_takes_64_mib_beside_it_at_most(peaks, dtype):
    small = {name: round(peak) for name, peak in peaks(dtype).items() if name.endswith("of 64 MiB")}
    assert len(small) == 7
    # The kernel counts pages per CPU and sums them up now and then: with many CPUs it is some MiB off.
    assert {name: peak for name, peak in small.items() if not 48 < peak < 64 + 64 + 12} == {}


# Parameters that nobody writes ---------------------------------------------------------------------------------------


class Own(nn.Parameter):
    def __new__(cls, data, requires_grad=True):
        return torch.Tensor._make_subclass(cls, data, requires_grad)


UNWRITTEN = {
    "empty": lambda: torch.empty(64, 64),
    "empty in fp64": lambda: torch.empty(64, 64, dtype=torch.float64),
    "empty in fp16": lambda: torch.empty(64, 64, dtype=torch.float16),
    "empty in complex": lambda: torch.empty(64, 64, dtype=torch.complex64),
    "empty_strided": lambda: torch.empty_strided((64, 64), (1, 64)),
    "empty_permuted": lambda: torch.empty_permuted((64, 64), (1, 0)),
    "channels_last": lambda: torch.empty(8, 8, 8, 8, memory_format=torch.channels_last),
    "Tensor": lambda: torch.Tensor(64, 64),
    "new": lambda: torch.zeros(1).new(64, 64),
    "new_empty": lambda: torch.zeros(1).new_empty(64, 64),
    "new_empty_strided": lambda: torch.zeros(1).new_empty_strided((64, 64), (64, 1)),
    "empty_like": lambda: torch.empty_like(torch.zeros(64, 64)),
    "to_empty": lambda: nn.Linear(64, 64, device="meta").to_empty(device="cpu").weight,
    "a part": lambda: torch.empty(128, 64)[32:96],
    "transposed": lambda: torch.empty(64, 64).t(),
    "in another shape": lambda: torch.empty(4096).view(64, 64),
    "of one element": lambda: torch.empty(1),
    "a scalar": lambda: torch.empty(()),
}


def _with_parameter(make, wrap=nn.Parameter):
    module = nn.Module()
    module.forgotten = wrap(make())
    module.forward = lambda: module.forgotten.sum()
    return module


def _assert_zero(model, right):
    ours = model.forgotten
    assert type(ours) is type(right) and ours.dtype == right.dtype and ours.stride() == right.stride()
    assert ours.shape == right.shape and not ours.detach().any() and ours.requires_grad
    assert fastinit.uninitialized(model) == []


@pytest.mark.parametrize("name", UNWRITTEN)
@over_dtypes
def test_a_parameter_that_nobody_writes_is_zero_and_named_however_it_was_made(name, dtype):
    with pytest.warns(UserWarning) as caught:
        model = inside(lambda: _with_parameter(UNWRITTEN[name]), dtype)
    right = plain(lambda: _with_parameter(UNWRITTEN[name]), dtype).forgotten
    assert [bool(re.search(r"\bforgotten\b", str(warning.message))) for warning in caught] == [True]
    _assert_zero(model, right)


@pytest.mark.parametrize("name", UNWRITTEN)
@over_dtypes
def test_a_parameter_of_a_class_of_its_own_that_nobody_writes_is_zero(name, dtype):
    model = quiet(lambda: inside(lambda: _with_parameter(UNWRITTEN[name], Own), dtype))
    _assert_zero(model, plain(lambda: _with_parameter(UNWRITTEN[name], Own), dtype).forgotten)


@pytest.mark.parametrize("name", UNWRITTEN)
@over_dtypes
def test_a_parameter_that_nobody_writes_stays_unwritten_with_empty_and_is_named(name, dtype):
    model = inside(lambda: _with_parameter(UNWRITTEN[name]), dtype, empty=True)
    assert fastinit.uninitialized(model) == ["forgotten"]
    with pytest.raises(RuntimeError, match=r"\bforgotten\b"):
        model()
    with pytest.warns(UserWarning, match=r"\bforgotten\b"):
        fastinit.initialize(model)
    assert fastinit.uninitialized(model) == [] and not model.forgotten.detach().any()
    assert model().item() == 0


@over_dtypes
def test_a_parameter_that_is_read_before_anybody_writes_it_is_zero(dtype):
    def construct():
        read = {}
        for name, make in UNWRITTEN.items():
            parameter = nn.Parameter(make())
            read[name] = parameter.detach().abs().sum().item()
            read[f"numpy of {name}"] = np.abs(make().detach().to(torch.complex64).numpy()).sum()
        return read

    assert {name: value for name, value in quiet(lambda: inside(construct, dtype)).items() if value != 0} == {}


@torch.library.custom_op("fastinit_cases::one_", mutates_args={"x"})
def one_(x: torch.Tensor) -> None:
    x.fill_(1.0)


@torch.jit.script
def scripted(x: torch.Tensor):
    return x.fill_(1.0)


def _in_a_thread(parameter):
    thread = threading.Thread(target=lambda: nn.init.ones_(parameter))
    thread.start()
    thread.join()


def _through_numpy(parameter):
    parameter.data.view(torch.uint8).numpy()[:] = torch.ones(64, 64, dtype=parameter.dtype).view(torch.uint8).numpy()


def _through_its_address(parameter):
    ones = torch.ones(64, 64, dtype=parameter.dtype)
    ctypes.memmove(parameter.data_ptr(), ones.data_ptr(), ones.nbytes)


# Writers, and whether anybody could know that they write.
WRITERS = {
    "out=": (lambda p: torch.ones(64, 64, out=p), True),
    "arithmetic to it": (lambda p: torch.add(torch.zeros(64, 64), 1, out=p), True),
    "slices": (lambda p: [p[k : k + 8].fill_(1.0) for k in range(0, 64, 8)], True),
    "halves": (lambda p: (p[:, :32].copy_(torch.ones(64, 32)), p.data[:, 32:].fill_(1.0)), True),
    "an operator": (lambda p: torch.ops.aten.fill_.Scalar(p, 1.0), True),
    "a custom operator": (lambda p: one_(p), True),
    "TorchScript": (lambda p: scripted(p), True),
    "a thread": (_in_a_thread, True),
    "an alias": (lambda p: p.detach().view(-1).as_strided((64, 64), (64, 1)).fill_(1.0), True),
    "other data": (lambda p: setattr(p, "data", torch.ones(64, 64)), True),
    "set_": (lambda p: p.set_(torch.ones(64, 64)), True),
    "swap_tensors": (lambda p: torch.utils.swap_tensors(p, nn.Parameter(torch.ones(64, 64))), True),
    "foreach": (lambda p: torch._foreach_copy_([p], [torch.ones(64, 64)]), True),
    "a parameter vector": (lambda p: nn.utils.vector_to_parameters(torch.ones(4096), [p]), True),
    "numpy": (_through_numpy, False),
    "its address": (_through_its_address, False),
    "dlpack": (lambda p: torch.from_dlpack(p.detach()).fill_(1.0), False),
    "storage": (lambda p: torch.empty(0, dtype=p.dtype).set_(p.detach().untyped_storage()).fill_(1.0), False),
}


@pytest.mark.parametrize("name", WRITERS)
@over_dtypes
def test_what_is_written_by_any_path_has_its_values_and_is_not_complained_of(name, dtype):
    write, known = WRITERS[name]

    def construct():
        module = _with_parameter(UNWRITTEN["empty"])
        with torch.no_grad():
            write(module.forgotten)
        return module

    assert (plain(construct, dtype).forgotten == 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if known else "ignore")
        model = inside(construct, dtype)
    assert model.forgotten.dtype == DTYPES[dtype] and (model.forgotten == 1).all()
    assert type(model.forgotten) is nn.Parameter and model.forgotten.stride() == (64, 1)


@pytest.mark.filterwarnings("ignore")
def test_what_is_empty_is_zero_in_every_dtype_that_torch_has():
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    made = inside(lambda: [torch.empty(32, dtype=each) for each in dtypes])
    assert {each.dtype for each in made} == dtypes
    assert not any(any(each.untyped_storage()) for each in made)
