"""Faults while a model is created on a GPU: its memory comes back, and what is created next is right."""

import gc

import pytest
import torch
import torch._inductor.config  # use_deterministic_algorithms does, which would be a change of torch's state
from models import SEED, assert_same_bits, built, different, state_of_torch
from torch import nn

import fastinit

MIB = 1 << 20


def model():
    return nn.Sequential(nn.Linear(256, 512), nn.LayerNorm(512), nn.BatchNorm1d(512), nn.Linear(512, 256))


def allocated():
    gc.collect()
    return torch.cuda.memory_allocated()


@pytest.fixture(autouse=True)
def intact():
    """After the test torch is as before it, the GPU holds no more, and the next model is what it always is."""
    expected, before, held = built(model, "bf16", "cuda"), state_of_torch(), allocated()
    yield
    assert not different(before, state_of_torch())
    assert allocated() <= held
    assert_same_bits(built(model, "bf16", "cuda"), expected)


@pytest.fixture
def little_memory():
    """1 GiB more than is in use."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1024 * MIB) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.caching_allocator
@pytest.mark.parametrize("options", [{}, {"empty": True}], ids=str)
def test_memory_that_is_not_there_is_asked_for_by_name_and_all_is_freed(little_memory, options):
    before = allocated()
    for _ in range(3):
        made = []
        with pytest.raises(torch.OutOfMemoryError, match=r"no memory for .*\(8192, 8192\).*\bweight\b"):
            with fastinit.on("cuda", "bf16", seed=SEED, **options):
                made.append(nn.Sequential(*(nn.Linear(8192, 8192) for _ in range(16))))
            fastinit.initialize(made[0])
        made.clear()
        assert allocated() == before
    fits = built(lambda: nn.Linear(16384, 16384, bias=False), "bf16", "cuda")
    assert fits.weight.nbytes == 512 * MIB


def test_a_constructor_that_raises_leaves_no_memory():
    before = allocated()

    def broken():
        kept = nn.Linear(8192, 8192)
        kept.weight.sum().item()  # has values now
        raise ValueError("planned")

    with pytest.raises(ValueError, match="planned"), fastinit.on("cuda", "bf16"):
        broken()
    assert allocated() == before


def test_a_hundred_contexts_in_a_row_hold_no_more_memory():
    built(model, "bf16", "cuda")
    before, reserved = allocated(), torch.cuda.memory_reserved()
    for _ in range(100):
        built(model, "bf16", "cuda")
    assert allocated() == before
    assert torch.cuda.memory_reserved() == reserved


def test_a_context_in_a_captured_graph_is_refused():
    with pytest.raises(RuntimeError, match="before the capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            with fastinit.on("cuda", "bf16"):
                nn.Linear(8, 8)


@pytest.mark.caching_allocator
def test_values_that_a_captured_graph_asks_for_are_refused_and_come_afterwards():
    with fastinit.on("cuda", "bf16", seed=SEED):
        made = model()
        with pytest.raises(RuntimeError, match="before the capture"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                made[0].weight.sum()
    assert_same_bits(made, built(model, "bf16", "cuda"))


@pytest.mark.parametrize("names", [None, ["0.weight"]])
def test_initialize_in_a_captured_graph_is_refused(names):
    with fastinit.on("cuda", "bf16", seed=SEED, empty=True):
        made = model()
    with pytest.raises(RuntimeError, match="before the capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            fastinit.initialize(made, names)
    fastinit.initialize(made)
    assert_same_bits(made, built(model, "bf16", "cuda"))


@pytest.mark.parametrize("outer, inner", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_context_on_another_device_inside_of_the_first(outer, inner):
    with fastinit.on(outer, "fp16", seed=SEED):
        first = nn.Linear(256, 256)
        with fastinit.on(inner, "bf16", seed=SEED):
            second = model()
        third = nn.Linear(256, 256)
    assert_same_bits(second, built(model, "bf16", inner))
    both = built(lambda: nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), "fp16", outer)
    assert_same_bits(nn.Sequential(first, third), both)


def test_deterministic_algorithms_and_inference_mode_change_nothing():
    expected = built(model, "bf16", "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(built(model, "bf16", "cuda"), expected)
        with fastinit.on("cuda", "bf16", seed=SEED, empty=True):
            empty = model()
        assert set(fastinit.uninitialized(empty)) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        made = built(model, "bf16", "cuda")
    assert_same_bits(made, expected)
    assert not made[0].weight.is_inference()
