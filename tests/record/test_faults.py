"""Faults while a model is created: nothing is left behind, and what is created next is right."""

import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from contextlib import suppress

import pytest
import torch
import torch._dynamo  # which replaces torch.manual_seed when it is first imported, as some meta kernels do
from models import SEED, assert_same_bits, built, different, made, plain, registered, same_bits, state_of_torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastinit
from fastinit.record import records, tensors, unwritten
from fastinit.record.block import current


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.trunc_normal_(self.up.weight, std=0.02)
        self.register_buffer("table", torch.linspace(0, 1, width).cos())


def model():
    return nn.Sequential(
        Block(12), nn.BatchNorm1d(12), Block(12), nn.utils.parametrizations.weight_norm(nn.Linear(12, 3))
    )


@pytest.fixture
def intact():
    """After the test torch is as before it, and the next model is what it always is."""
    importlib.import_module("torch._dynamo")  # which replaces torch.manual_seed when it is first imported
    expected, before = built(model, "bf16"), state_of_torch()
    yield
    assert not different(before, state_of_torch())
    assert_same_bits(built(model, "bf16"), expected)


# Memory ---------------------------------------------------------------------------------------------------------------


def too_large(width=2**45):
    layers = [Block(8) for _ in range(20)]
    return nn.Sequential(*layers, nn.Sequential(nn.Linear(16, width)), *(Block(8) for _ in range(20)))


@pytest.mark.parametrize("options", [{}, {"empty": True}], ids=str)
def test_memory_that_is_not_there_is_asked_for_by_name_and_all_is_freed(intact, options):
    made = []
    with pytest.raises(RuntimeError, match=r"no memory for .*\(35184372088832,.* 20\.0\.(weight|bias)"):
        with fastinit.on("cpu", "bf16", seed=SEED, **options):
            made.append(too_large())
        fastinit.initialize(made[0])
    # All of them are still to come: what there is memory for gets its values when somebody asks.
    pending = {type(tensor) for tensor in made[0].parameters()}
    assert pending == ({tensors.Placeholder} if not options else {unwritten.Unwritten, nn.Parameter})
    assert made[0][0].norm.weight.tolist() == [1.0] * 8
    if options:
        assert fastinit.initialize(made[0][0]) and len(fastinit.uninitialized(made[0])) > 80


def test_memory_that_is_short_while_values_are_read_leaves_all_of_them_to_come(intact, monkeypatch):
    def constructor(read):
        first, second = nn.Linear(8, 8), nn.Linear(8, 8)
        read(first.weight, second.weight)
        return nn.Sequential(first, second)

    def refused(*weights):
        calls = []

        def short(shape, *arguments, **options):
            calls.append(shape)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("planned")
            return allocate(shape, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(records, "allocate", short)
            with pytest.raises(torch.OutOfMemoryError, match="planned"):
                torch.linalg.multi_dot(weights)  # of both at once
        assert len(calls) == 2

    allocate = records.allocate
    assert_same_bits(built(lambda: constructor(refused)), built(lambda: constructor(lambda *weights: None)))


LIMITED = """
import gc, resource, sys, torch, fastinit
from torch import nn

def used():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

with fastinit.on("cpu", "bf16"):
    nn.Linear(64, 64)
before = used()
resource.setrlimit(resource.RLIMIT_AS, (before + (600 << 20), resource.RLIM_INFINITY))
for _ in range(3):
    model = []
    try:
        with fastinit.on("cpu", "bf16"):
            model.append(nn.Sequential(*(nn.Linear(8192, 8192) for _ in range(8))))
    except RuntimeError as error:
        assert "no memory for a tensor of shape (8192, 8192)" in str(error) and " of Sequential" in str(error), error
    else:
        raise AssertionError("8 x 128 MiB fit into 600 MiB")
    assert used() - before < 64 << 20, used() - before
with fastinit.on("cpu", "bf16"):
    kept = nn.Linear(8192, 8192)
assert torch.isfinite(kept.weight).all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its address space as Linux does")
def test_a_process_that_runs_out_of_memory_in_mid_model_goes_on_with_all_of_it():
    # Address space is counted. The C library reserves 64 MiB of it for any thread that finds its heap in use, and
    # a thread's stack takes 8 MiB: one heap and two threads, that the count is the tensors' on any machine.
    alone = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", LIMITED], check=True, timeout=120, env=alone)


@pytest.mark.parametrize("way", [{}, {"empty": True}, {"shard": True}], ids=str)
def test_a_hundred_contexts_leave_no_objects(intact, way):
    def once():
        with fastinit.on("cpu", "bf16", seed=SEED, **way):
            model()

    def objects():
        gc.collect()
        return len(gc.get_objects())

    for _ in range(5):
        once()
    before = objects()
    for _ in range(100):
        once()
    assert objects() - before < 50


def test_half_built_models_are_freed(intact):
    alive = []

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.me = nn.Sequential(Block(12)), [self]  # a cycle
            alive.append(weakref.ref(self.layers[0].up.weight))
            raise ValueError("planned")

    with pytest.raises(ValueError, match="planned"):
        with fastinit.on("cpu", "bf16"):
            Broken()
    with fastinit.on("cpu", "bf16") as report:
        with pytest.raises(ValueError, match="planned"):
            Broken()
        gc.collect()
        kept = nn.Linear(3, 3)
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert report.bytes == sum(tensor.nbytes for tensor in kept.parameters())


# Interruptions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt; a shell's background jobs inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class InterruptedHere(nn.Module):
    """Gets a Ctrl-C before its n-th layer."""

    def __init__(self, number):
        super().__init__()
        for at in range(6):
            if at == number:
                signal.raise_signal(signal.SIGINT)
            self.add_module(str(at), Block(12))


@pytest.mark.parametrize("way", [{}, {"empty": True}, {"shard": True}], ids=str)
@pytest.mark.parametrize("number", range(6))
def test_an_interrupt_in_a_constructor_leaves_torch_as_it_was(intact, interruptible, number, way):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with fastinit.on("cpu", "bf16", seed=SEED, **way):
            InterruptedHere(number)
    assert current.get() is None
    assert signal.getsignal(signal.SIGINT) is handler


class InterruptedLater:
    """An engine that gets a Ctrl-C while it takes the parameters over, in the middle of the context's end."""

    done = False

    def begin(self):
        return lambda: None

    def place(self, parameters, timing):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)  # Python looks for signals on the way
        self.done = True


def test_an_interrupt_while_a_context_ends_waits_until_it_has_ended(intact, interruptible):
    engine = InterruptedLater()
    with pytest.raises(KeyboardInterrupt):
        with fastinit.on("cpu", "bf16", seed=SEED, shard=engine):
            model()
    assert engine.done
    assert current.get() is None


def test_an_engine_that_cannot_begin_leaves_torch_as_it_was(intact):
    class Refuses(InterruptedLater):
        def begin(self):
            raise ValueError("no engine")

    with pytest.raises(ValueError, match="no engine"), fastinit.on("cpu", "bf16", seed=SEED, shard=Refuses()):
        pass
    assert current.get() is None


def test_what_an_engine_has_begun_ends_with_the_block(intact):
    ended = []

    class Begins(InterruptedLater):
        def begin(self):
            return lambda: ended.append(True)

        def place(self, parameters, timing):
            assert not ended

    for raises in (False, True):
        with suppress(KeyError), fastinit.on("cpu", "bf16", seed=SEED, shard=Begins()):
            model()
            if raises:
                raise KeyError
    assert ended == [True, True]


def test_a_thread_that_is_not_the_main_one_has_no_say_in_signals(intact):
    made_there = []
    thread = threading.Thread(target=lambda: made_there.append(built(model, "bf16")))
    thread.start()
    thread.join()
    assert_same_bits(made_there[0], built(model, "bf16"))


# Processes ------------------------------------------------------------------------------------------------------------


def _build(queue):
    queue.put({name: tensor.detach().float().numpy() for name, tensor in registered(built(model, "bf16")).items()})


def child(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_build, args=(queue,))
    process.start()
    tensors = queue.get(timeout=60)
    process.join()
    assert process.exitcode == 0
    return tensors


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_builds_the_same_model(intact, method):
    expected = registered(built(model, "bf16"))
    got = child(method)
    assert all(same_bits(torch.from_numpy(got[name]), tensor.detach().float()) for name, tensor in expected.items())


def test_a_worker_that_is_forked_in_the_context_has_one_of_its_own(intact):
    with fastinit.on("cpu", "bf16", seed=1):
        first = model()
        got = child("fork")
        second = model()
    expected = registered(built(model, "bf16"))
    assert all(same_bits(torch.from_numpy(got[name]), tensor.detach().float()) for name, tensor in expected.items())
    assert_same_bits(nn.ModuleList([first, second]), built(lambda: nn.ModuleList([model(), model()]), "bf16", seed=1))


def test_threads_build_different_models_at_once(intact):
    widths = [8, 12, 16, 20] * 3
    results, barrier = {}, threading.Barrier(len(widths))

    def work(number, width):
        barrier.wait()
        for _ in range(5):
            results[number] = built(lambda: Block(width), ("bf16", "fp16", "fp32")[number % 3], seed=number)

    threads = [threading.Thread(target=work, args=arguments) for arguments in enumerate(widths)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for number, width in enumerate(widths):
        alone = built(lambda width=width: Block(width), ("bf16", "fp16", "fp32")[number % 3], seed=number)
        assert_same_bits(results[number], alone)


# Modes of torch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["around", "inside"])
def test_inference_mode_gives_parameters_that_can_be_used_outside_of_it(intact, order):
    on = fastinit.on("cpu", "fp32", seed=SEED)
    first, second = (torch.inference_mode(), on) if order == "around" else (on, torch.inference_mode())
    with first, second:
        layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        part = layers[0].weight[:2]
    assert_same_bits(layers, built(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))))
    assert same_bits(part, layers[0].weight[:2])
    layers(torch.ones(2, 4)).sum().backward()
    before = layers[1].bias.detach().clone()
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter -= 0.1 * parameter.grad
    assert torch.equal(layers[1].bias, before - 0.2)


def test_fake_tensors_stay_fake():
    def model():
        return nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24))

    with FakeTensorMode(), fastinit.on("cpu", "bf16"):
        outside = model()
    with fastinit.on("cpu", "bf16", seed=SEED):
        before = nn.Linear(3, 3)
        with FakeTensorMode():
            inside = model()
        after = nn.Linear(3, 3)
    for fake in (outside, inside):
        assert all(isinstance(tensor, FakeTensor) for tensor in fake[0].parameters())
        assert fake[0].weight.dtype == torch.bfloat16 and fake[0].weight.shape == (24, 12)
    assert all(type(each) is nn.Parameter and each.any() for each in (before.weight, after.weight))


@pytest.mark.parametrize("way", ["at once", "empty", "sharded"])
def test_deterministic_algorithms_change_nothing(intact, way):
    expected = made(model, way, "bf16")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert_same_bits(made(model, way, "bf16"), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_empty_models_are_known_as_unwritten_under_deterministic_algorithms(intact):
    torch.use_deterministic_algorithms(True)
    try:
        with fastinit.on("cpu", "bf16", seed=SEED, empty=True):
            lazy = nn.Linear(4, 4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert fastinit.uninitialized(lazy) == ["weight", "bias"]


def test_a_host_that_flushes_subnormals_gets_the_same_bits(intact):
    def tiny():
        layer = nn.Linear(64, 64)
        nn.init.normal_(layer.weight, std=1e-39)
        return layer

    expected = built(tiny)
    assert ((expected.weight != 0) & (expected.weight.abs() < 1e-38)).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush subnormals")
    try:
        got = built(tiny)
        bits = got.weight.detach().view(torch.int32)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits, expected.weight.detach().view(torch.int32))


@pytest.mark.parametrize("how", ["script", "trace", "compile"])
def test_a_constructor_may_compile_what_it_makes(how):
    with fastinit.on("cpu", empty=True):
        unwritten = nn.Linear(4, 4)  # for whose sake every module is looked at before its first use

    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.Linear(4, 4)
            example = torch.ones(2, 4)
            if how == "compile":
                self.layer = torch.compile(layer, backend="eager")
            else:
                self.layer = torch.jit.script(layer) if how == "script" else torch.jit.trace(layer, example)
            self.register_buffer("answer", self.layer(example).detach())
            self.after = nn.Linear(4, 4)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = built(Compiled)
        assert torch.equal(got.layer(torch.ones(2, 4)), got.answer) and got.answer.any()
    expected = registered(built(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))
    assert same_bits(registered(got)["after.weight"], expected["1.weight"])
    weights = [tensor for name, tensor in got.named_parameters() if name.startswith("layer") and "weight" in name]
    assert [same_bits(weight, expected["0.weight"]) for weight in weights] == [True]
    assert fastinit.uninitialized(unwritten) == ["weight", "bias"]


@pytest.mark.parametrize("device", ["meta", "hpu"])  # hpu needs a package that is not here
def test_a_device_that_is_not_supported_is_refused_inside_of_a_context_too(intact, device):
    with fastinit.on("cpu", "bf16", seed=SEED):
        first = nn.Linear(12, 12)
        with pytest.raises((ValueError, RuntimeError), match=f"device='{device}'"), fastinit.on(device, "fp16"):
            pass
        second = nn.Linear(12, 12)
    assert_same_bits(
        nn.ModuleList([first, second]), built(lambda: nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)]), "bf16")
    )


def test_what_is_compared_is_random_but_for_the_seed():
    assert not same_bits(plain(model, seed=1)[0].up.weight, plain(model, seed=2)[0].up.weight)
    assert not same_bits(built(model, seed=1)[0].up.weight, built(model, seed=2)[0].up.weight)
