"""Models made on a GPU: the bits of the CPU, torch's structure, and no memory beyond the model."""

import gc
import math
import subprocess
import sys
import warnings

import pytest
import torch
from models import (
    DTYPES,
    HALVES,
    SEED,
    WAYS,
    assert_same_bits,
    assert_same_structure,
    built,
    module_cases,
    plain,
    registered,
    same_bits,
)
from torch import nn
from torch.nn import init

import fastinit

MIB = 1 << 20
CASES = [pytest.param(constructor, id=name) for name, constructor in module_cases()]
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def assert_cpu_bits(constructor, dtype):
    """Fail unless a model has the same bits on the GPU and on the CPU, and every tensor is on the GPU."""
    ours, reference = built(constructor, dtype, "cuda"), built(constructor, dtype, "cpu")
    wrong = {
        name: str(tensor.device)
        for name, tensor in registered(ours).items()
        if not nn.parameter.is_lazy(tensor) and tensor.device != torch.device("cuda", torch.cuda.current_device())
    }
    assert not wrong, wrong
    assert_same_bits(ours, reference)
    return ours


@pytest.mark.parametrize("constructor", CASES)
@over_dtypes
def test_modules_have_the_bits_of_the_cpu(constructor, dtype):
    assert_cpu_bits(constructor, dtype)


@pytest.mark.parametrize("constructor", CASES)
@pytest.mark.parametrize("dtype", HALVES)
def test_modules_have_the_structure_that_torch_gives_them_on_the_gpu(constructor, dtype):
    assert_same_structure(built(constructor, dtype, "cuda"), plain(constructor, dtype, "cuda"))


@over_dtypes
def test_init_functions_have_the_bits_of_the_cpu(dtype):
    from test_torch_init import CALLS, calling

    for name, calls in CALLS.items():
        for keywords, shape in calls:
            ours, reference = (built(calling(name, keywords, shape), dtype, d).weight.detach() for d in ("cuda", "cpu"))
            assert ours.is_cuda and same_bits(ours, reference), (name, keywords, shape)


@over_dtypes
def test_hand_written_truncated_normals_have_the_bits_of_the_cpu(dtype):
    from test_torch_init import CHAINS, Weight

    for function, arguments in CHAINS.values():
        assert_cpu_bits(lambda f=function, a=arguments: Weight((200, 100), lambda w: f(w, *a)), dtype)


@pytest.mark.parametrize("way", WAYS)
@over_dtypes
def test_weights_by_name_have_the_bits_of_the_cpu(dtype, way):
    from test_streams_by_name import USES, Model, Read, named

    for constructor in (Model, *(lambda use=use: Read(use) for name, use in USES.items() if name != "numpy")):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fastinit.on: names decide")
            ours, reference = (named(constructor, way, dtype, device=device) for device in ("cuda", "cpu"))
        assert all(tensor.is_cuda for tensor in registered(ours).values())
        assert_same_bits(ours, reference)


@over_dtypes
def test_steps_slices_and_double_inits_have_the_bits_of_the_cpu(dtype):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.empty(96, 70))
            init.normal_(self.w)
            init.normal_(self.w, std=0.02)
            init.xavier_uniform_(self.w[:32])
            with torch.no_grad():
                self.w.mul_(1 / math.sqrt(24)).add_(0.01).clamp_(-0.05, 0.05)
                self.w[40:50, 3] = 0.7
            for k in range(12):
                init.uniform_(self.w.data[:, 5 * k : 5 * k + 3], k, k + 1)
            self.embedding = nn.Embedding(300, 24, padding_idx=7)
            self.register_buffer("mask", torch.full((64, 64), float("-inf")).triu(1))
            self.register_buffer("permutation", torch.randperm(50))
            self.register_buffer("exponential", torch.empty(50).exponential_())

    assert_cpu_bits(Parts, dtype)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "bert", "t5", "vit", "whisper", "mamba", "clip"])
def test_transformers_models_have_the_bits_of_the_cpu(name, dtype):
    pytest.importorskip("transformers")
    from test_transformers import MODELS, logits

    constructor = MODELS[name][0]
    ours, reference = built(constructor, dtype, "cuda"), registered(built(constructor, dtype, "cpu"))
    assert_same_structure(ours, plain(constructor, dtype, "cuda"))
    for tensor_name, tensor in registered(ours).items():
        if tensor_name.endswith("weight") and tensor_name != "model.encoder.embed_positions.weight":
            assert same_bits(tensor, reference[tensor_name]), tensor_name
        # Torch computes some tables on the device, Whisper's sinusoids among them, where a sine or a logarithm may end
        # in another last bit.
        tolerance = 2e-6 if tensor.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(tensor.cpu(), reference[tensor_name], rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        inputs = {key: value.cuda() for key, value in MODELS[name][1](DTYPES[dtype]).items()}
        output = logits(name, _Bound(ours.eval(), inputs), DTYPES[dtype])
    assert output.is_cuda and torch.isfinite(output).all()


class _Bound:
    """A model that is called with inputs on the GPU, whatever it is given."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model, inputs

    def __call__(self, **_):
        return self.model(**self.inputs)


def test_a_model_on_the_gpu_trains_and_moves():
    model = built(lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)), "bf16", "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = model(torch.ones(4, 64, device="cuda", dtype=torch.bfloat16)).float().square().mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss) and all(torch.isfinite(p).all() for p in model.parameters())
    assert next(model.cpu().parameters()).device.type == "cpu"


def test_the_default_device_is_the_gpu_and_an_inner_one_wins():
    with fastinit.on("cuda", "bf16", seed=SEED):
        assert torch.get_default_device().type == "cuda" and torch.ones(2).is_cuda and torch.arange(3).is_cuda
        on_cpu, named = torch.ones(3, device="cpu") / 3, torch.randn(3, device="cpu")
        with torch.device("meta"):
            inner = nn.Linear(3, 3)
        outer = nn.Linear(3, 3)
    assert inner.weight.is_meta and outer.weight.is_cuda
    assert on_cpu.device.type == named.device.type == "cpu" and on_cpu.dtype == torch.bfloat16
    assert torch.equal(on_cpu, (torch.ones(3) / 3).bfloat16())


def test_fills_are_on_the_current_stream():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The fill has to wait for this work, and the read after it for the fill.
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 4096
        model = built(lambda: nn.Linear(4096, 4096), "bf16", "cuda")
        total = model.weight.float().abs().sum()
    stream.synchronize()
    assert total.item() == model.weight.float().abs().sum().item()
    assert_same_bits(model, built(lambda: nn.Linear(4096, 4096), "bf16", "cpu"))


def test_the_cuda_generator_is_left_alone():
    before = torch.cuda.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built(lambda: nn.Sequential(nn.Linear(8, 8), nn.Transformer(16, 2, 1, 1)), "bf16", "cuda")
        built(lambda: nn.functional.dropout(torch.rand(50)), "fp32", "cuda")
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_a_gpu_that_does_not_exist_is_refused():
    count = torch.cuda.device_count()
    with pytest.raises(RuntimeError, match=rf"cuda:{count}.*{count} GPU"):
        with fastinit.on(f"cuda:{count}", "bf16"):
            raise AssertionError("the block must not run")


@pytest.mark.caching_allocator
def test_running_out_of_memory_leaves_nothing_behind():
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    rows = total // (4 * 2 * 65536)
    with pytest.raises(torch.OutOfMemoryError):
        with fastinit.on("cuda", "bf16", seed=SEED):
            kept = [nn.Parameter(torch.empty(rows, 65536).normal_()) for _ in range(6)]
    del kept
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == before
    assert torch.get_default_dtype() == torch.float32
    assert_cpu_bits(lambda: nn.Linear(20, 20), "bf16")


MEMORY = """
import gc, sys, torch, fastinit
from torch import nn

def resident():
    gc.collect()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width)
        nn.init.trunc_normal_(self.up.weight, std=0.02)
        self.register_buffer("table", torch.linspace(0, 1, width))

def make(width, layers):
    return nn.Sequential(nn.Embedding(8 * width, width, padding_idx=0), *(Block(width) for _ in range(layers)))

with fastinit.on("cuda", "{dtype}", seed=0):
    make(64, 2)
torch.cuda.synchronize()
gc.collect()
torch.cuda.empty_cache()
torch.cuda.reset_peak_memory_stats()
allocated, reserved, host = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), resident()
with fastinit.on("cuda", "{dtype}", seed=0) as report:
    model = make({width}, {layers})
torch.cuda.synchronize()
nbytes = sum(t.nbytes for t in model.state_dict().values())
print(
    nbytes,
    torch.cuda.max_memory_allocated() - allocated,
    torch.cuda.memory_reserved() - reserved - (torch.cuda.memory_allocated() - allocated),
    resident() - host,
)
"""


@pytest.mark.parametrize("dtype, width, layers", [("bf16", 4096, 24), ("fp32", 4096, 12), ("bf16", 512, 40)])
def test_peak_memory_is_the_model_and_the_host_does_not_grow(dtype, width, layers):
    script = MEMORY.format(dtype=dtype, width=width, layers=layers)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    nbytes, peak, unused, host = map(int, result.stdout.split())
    assert peak <= nbytes + 64 * MIB
    assert unused <= max(nbytes // 8, 256 * MIB)
    assert host <= 50 * MIB
