"""Threads and coroutines: pending tensors in a thread that has no block, and blocks that do not see each other's."""

import asyncio
import copy
import io
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import assert_as_torch, dirty, inside, over_dtypes
from models import DTYPES, SEED, assert_same_bits, default_dtype, different, same_bits, state_of_torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import fastinit
from fastinit.record.records import lock
from fastinit.record.tensors import Placeholder, become_real


def in_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(60)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.ones, self.ramp = nn.Parameter(torch.ones(4)), nn.Parameter(torch.arange(4) / 7)
        self.register_buffer("x", torch.full((2, 4), 0.5))


def _saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file)


USES = {
    "constant_": lambda m: nn.init.constant_(m.first.weight, 2.0),
    "normal_": lambda m: nn.init.normal_(m.first.weight),
    "xavier_uniform_": lambda m: nn.init.xavier_uniform_(m.second.weight),
    "orthogonal_": lambda m: nn.init.orthogonal_(m.second.weight),
    "reset_parameters": lambda m: m.first.reset_parameters(),
    "a slice": lambda m: torch.no_grad()(m.first.weight[1:3].zero_)(),
    "a step": lambda m: torch.no_grad()(m.first.weight.mul_)(0.5),
    "a copy": lambda m: torch.no_grad()(m.first.weight.copy_)(m.second.weight),
    "data": lambda m: m.first.bias.data.fill_(0.1),
    "a sum": lambda m: m.ones.detach().sum(),
    "an item": lambda m: float(m.ramp.detach().sum()),
    "a list": lambda m: m.ramp.tolist(),
    "numpy": lambda m: torch.from_numpy(m.ramp.detach().float().numpy().copy()),
    "a product": lambda m: (m.first.weight @ m.second.weight).detach(),
    "a forward": lambda m: m.second(m.first(m.x)),
    "a forward without gradient": lambda m: torch.no_grad()(m.first)(m.x),
    "backward": lambda m: (m.first(m.x).float().sum().backward(), m.first.bias.grad)[1],
    "a state dict": lambda m: {name: value.clone() for name, value in m.state_dict().items()},
    "a checkpoint": _saved,
    "load_state_dict": lambda m: str(m.first.load_state_dict(m.second.state_dict())),
    "deepcopy": lambda m: list(copy.deepcopy(m).state_dict().values()),
    "pickle": lambda m: list(pickle.loads(pickle.dumps(m)).state_dict().values()),
    "a view": lambda m: m.first.weight.detach().t()[1:],
    "a conversion": lambda m: m.first.weight.detach().double(),
    "a requires_grad_": lambda m: m.first.weight.requires_grad_(False).requires_grad,
    "a comparison": lambda m: m.first.weight.detach() > 0,
    "scaled by another": lambda m: torch.no_grad()(m.first.weight.mul_)(m.ramp),
    "functional": lambda m: F.linear(m.x, m.first.weight, m.first.bias).detach(),
}


@pytest.mark.parametrize("name", USES)
@over_dtypes
def test_a_thread_without_a_block_uses_pending_tensors_as_the_blocks_own_thread_does(name, dtype):
    def construct(run):
        model = Pair()
        result = run(USES[name], model)
        return model, result, nn.Linear(3, 3)

    there, here = (inside(lambda run=run: construct(run), dtype) for run in (in_thread, lambda f, m: f(m)))
    for ours, right in zip((there[0], there[2]), (here[0], here[2]), strict=True):
        assert_same_bits(ours, right)
    for ours, right in zip(tree_leaves(there[1]), tree_leaves(here[1]), strict=True):
        if isinstance(right, torch.Tensor) and right.grad_fn is not None:
            assert_as_torch(ours, right, dtype)
        else:
            assert same_bits(ours, right) if isinstance(right, torch.Tensor) else ours == right, (ours, right)


@over_dtypes
def test_values_in_a_thread_are_those_that_the_code_says(dtype):
    dirty()
    with fastinit.on("cpu", dtype, seed=SEED), ThreadPoolExecutor(2) as pool:
        layers = [nn.Linear(2, 2) for _ in range(8)]
        list(pool.map(lambda layer: nn.init.constant_(layer.weight, 2.0), layers))
        ones = nn.Parameter(torch.ones(4))
        total = pool.submit(lambda: float(ones.sum())).result()
        made = pool.submit(lambda: nn.Linear(1, 1, dtype=None)).result()
    assert total == 4 and all((layer.weight == 2).all() and layer.weight.dtype == DTYPES[dtype] for layer in layers)
    assert made.weight.dtype == torch.float32 and type(made.weight) is nn.Parameter
    usual = inside(lambda: [nn.Linear(2, 2) for _ in range(8)], dtype)
    assert all(same_bits(a.bias.detach(), b.bias.detach()) for a, b in zip(layers, usual, strict=True))


@over_dtypes
def test_a_thread_without_a_block_cannot_let_a_pending_tensor_be_the_data_of_another_one(dtype):
    ordinary = nn.Parameter(torch.zeros(4, 4, dtype=DTYPES[dtype]))

    def assign(tensor):
        ordinary.data = tensor

    with fastinit.on("cpu", dtype, seed=SEED):
        layer = nn.Linear(4, 4)
        with pytest.raises(RuntimeError, match=r"fastinit: a tensor of shape \(4, 4\) has no memory while the block"):
            in_thread(assign, layer.weight)
        assert not ordinary.any()
        assign(layer.weight)
    assert same_bits(ordinary, layer.weight) and ordinary.any()


@over_dtypes
def test_threads_may_read_and_write_while_the_block_goes_on(dtype):
    def construct(run):
        models = [Pair() for _ in range(12)]
        results = [
            run(lambda m=m, k=k: (nn.init.constant_(m.ones, k), m.first.weight.sum().item()))
            for k, m in enumerate(models)
        ]
        return nn.ModuleList(models + [Pair() for _ in range(12)]), results

    with ThreadPoolExecutor(4) as pool:
        there, running = inside(lambda: construct(pool.submit), dtype)
        sums = [future.result()[1] for future in running]
    here, results = inside(lambda: construct(lambda f: f()), dtype)
    assert_same_bits(there, here)
    for ours, (_, right) in zip(sums, results, strict=True):  # which of them came after the end is a matter of time
        assert ours == pytest.approx(right, abs=0.05)


MEANWHILE = {
    "a sum": lambda w: w.sum(),
    "zero_": lambda w: torch.no_grad()(torch.ops.aten.zero_)(w),
    "a fill": lambda w: torch.no_grad()(torch.ops.aten.fill_)(w, 2.0),
    "a step": lambda w: torch.no_grad()(torch.ops.aten.mul_)(w, 2.0),
    "a clone": lambda w: w.clone(),
    "a view": lambda w: torch.ops.aten.t(w),
    "one like it": lambda w: torch.ops.aten.ones_like(w),
    "a copy": lambda w: torch.no_grad()(torch.ops.aten.copy_)(w, torch.ones(4, 4)),
    "a product": lambda w: w @ w,
    "its data": lambda w: w.data,
}
WAIT = (Placeholder.__torch_dispatch__.__func__.__code__, Placeholder.data.fget.__code__)


@pytest.mark.parametrize("name", MEANWHILE)
@over_dtypes
def test_what_has_become_real_while_another_thread_waited_is_an_ordinary_tensor(name, dtype):
    def waits(thread):
        frame = sys._current_frames().get(thread.ident)
        return frame is not None and frame.f_code in WAIT

    results = []
    with fastinit.on("cpu", dtype, seed=SEED):
        layer = nn.Linear(4, 4)
        thread = threading.Thread(target=lambda: results.append(MEANWHILE[name](layer.weight)))
        with lock:
            thread.start()
            for _ in range(10_000):
                if waits(thread):
                    break
                time.sleep(0.001)
            become_real(layer.weight)
        thread.join(60)
    usual = inside(lambda: nn.Linear(4, 4), dtype)
    assert_as_torch(results, [MEANWHILE[name](usual.weight)], dtype)
    assert_same_bits(layer, usual)


@over_dtypes
def test_a_thread_with_a_block_of_its_own_uses_tensors_of_another_block(dtype):
    def other(model):
        with fastinit.on("cpu", "fp32", seed=5):
            nn.init.constant_(model.ones, 3.0)
            made = nn.Linear(4, 4)
            return made, model.first.weight.detach().float().clone(), model.ramp.sum().item()

    def construct():
        model = Pair()
        return model, in_thread(other, model), nn.Linear(3, 3)

    model, (made, weight, total), last = inside(construct, dtype)
    right = inside(lambda: [Pair(), nn.Linear(3, 3)], dtype)
    assert_same_bits(made, inside(lambda: nn.Linear(4, 4), seed=5))
    assert_same_bits(last, right[1])
    assert (model.ones == 3).all() and same_bits(model.first.weight.detach(), right[0].first.weight.detach())
    assert torch.allclose(weight, model.first.weight.detach().float(), rtol=2**-7)
    assert total == pytest.approx(6 / 7, 1e-2)


@pytest.mark.parametrize("process", [torch.float32, torch.float16, torch.float64], ids=str)
@over_dtypes
def test_other_threads_never_see_another_default(process, dtype):
    seen, stop = set(), threading.Event()

    def look():
        while not stop.is_set():
            seen.add(ask())

    def ask():
        defaults = torch.get_default_dtype(), torch.get_default_device()
        return *defaults, torch.ones(1).dtype, torch.tensor(1.0).dtype, nn.Linear(1, 1).weight.dtype

    with default_dtype(process):
        thread = threading.Thread(target=look)
        thread.start()
        try:
            for _ in range(20):
                with fastinit.on("cpu", dtype, seed=SEED):
                    nn.Linear(3, 3), torch.linspace(0, 1, 5).cos(), nn.init.orthogonal_(torch.empty(3, 3))
                    asked = in_thread(ask)
                    with fastinit.on("cpu", "fp16", seed=SEED):
                        nested = in_thread(ask)
        finally:
            stop.set()
            thread.join()
        assert torch.get_default_dtype() == process
    right = (process, torch.device("cpu"), process, process, process)
    assert seen == {right} and asked == nested == right


# One context for two ------------------------------------------------------------------------------------------------


def _alone(dtype, seed):
    return inside(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), dtype, seed)


@pytest.mark.parametrize("order", ["as entered", "reversed"])
@over_dtypes
def test_two_threads_that_enter_one_context_get_what_each_gets_alone_or_are_refused(order, dtype):
    before, context, results = state_of_torch(), fastinit.on("cpu", dtype, seed=1), {}
    entered, leave = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]

    def work(k):
        try:
            with context:
                entered[k].set()
                first = nn.Linear(4, 4)
                assert leave[k].wait(30)
                results[k] = nn.Sequential(first, nn.Linear(4, 4))
        except Exception as error:
            results[k] = error
        finally:
            entered[k].set()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for k, thread in enumerate(threads):
        thread.start()
        assert entered[k].wait(30)
    for k in (0, 1) if order == "as entered" else (1, 0):
        leave[k].set()
        threads[k].join(30)
    _each_is_right_or_refused(results, [(dtype, 1)] * 2, before)


def _each_is_right_or_refused(results, specifications, before):
    assert any(isinstance(result, nn.Module) for result in results.values()), results
    for k, (dtype, seed) in enumerate(specifications):
        if isinstance(results[k], nn.Module):
            assert_same_bits(results[k], _alone(dtype, seed))
            assert all(type(p) is nn.Parameter for p in results[k].parameters())
        else:
            assert isinstance(results[k], (RuntimeError, ValueError)) and str(results[k]), results[k]
    assert not different(before, state_of_torch())
    for dtype, seed in specifications:
        assert_same_bits(_alone(dtype, seed), _alone(dtype, seed))


@pytest.mark.parametrize("first_out", [0, 1])
@over_dtypes
def test_two_tasks_with_a_block_each_do_not_see_each_others(first_out, dtype):
    specifications = [(dtype, 1), ("fp16", 2)]

    async def work(k, gates):
        try:
            with fastinit.on("cpu", specifications[k][0], seed=specifications[k][1]):
                first = nn.Linear(4, 4)
                await asyncio.sleep(0)
                assert torch.get_default_dtype() == DTYPES[specifications[k][0]]
                second = nn.Linear(4, 4)
                await asyncio.sleep(0)
                model = nn.Sequential(first, second)
                await gates[k].wait()
            return model
        finally:  # the first to leave lets the other one leave
            for gate in gates:
                gate.set()

    async def without():
        seen = []
        for _ in range(3):
            seen.append((torch.get_default_dtype(), torch.ones(1).dtype, type(nn.Linear(1, 1).weight)))
            await asyncio.sleep(0)
        return seen

    async def all_of_them():
        gates = [asyncio.Event(), asyncio.Event()]
        gates[first_out].set()
        return await asyncio.gather(work(0, gates), work(1, gates), without(), return_exceptions=True)

    before = state_of_torch()
    *models, seen = asyncio.run(asyncio.wait_for(all_of_them(), 30))
    _each_is_right_or_refused(dict(enumerate(models)), specifications, before)
    assert set(seen) == {(torch.float32, torch.float32, nn.Parameter)}


def test_what_torch_draws_for_a_factory_in_one_of_two_tasks_is_of_its_own_block():
    mean = torch.arange(4.0)

    async def work(seed):
        with fastinit.on("cpu", "fp32", seed=seed):
            drawn = []
            for _ in range(2):
                await asyncio.sleep(0)
                drawn.append(torch.normal(mean, 1.0))
            return torch.stack(drawn)

    async def both():
        return await asyncio.gather(work(1), work(2))

    for seed, drawn in enumerate(asyncio.run(both()), 1):
        assert torch.equal(drawn, asyncio.run(work(seed)))
