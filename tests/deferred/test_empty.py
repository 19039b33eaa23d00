"""`fastinit.on(..., empty=...)`: what is left unwritten, who notices, and how it is initialized afterwards."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from models import (
    DTYPES,
    SEED,
    assert_same_bits,
    assert_same_structure,
    built,
    module_cases,
    random_names,
    registered,
    same_bits,
)
from torch import nn
from torch.nn.modules import module as torch_module

import fastinit

over_dtypes = pytest.mark.parametrize("dtype", DTYPES)
X = torch.ones(2, 8)


def emptied(constructor, dtype="fp32", empty=True, seed=SEED):
    with fastinit.on("cpu", dtype, seed=seed, empty=empty):
        return constructor()


class Block(nn.Module):
    """Random, constant and computed tensors, buffers of both kinds, and a weight that is used without a call."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.embedding = nn.Embedding(10, 8, padding_idx=3)
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.computed = nn.Parameter(-torch.exp(torch.arange(8.0) / 8))
        self.register_buffer("table", torch.sin(torch.arange(8.0)))
        self.register_buffer("noise", torch.randn(8))
        self.register_buffer("projection", torch.randn(8), persistent=False)

    def forward(self, x):
        x = nn.functional.linear(x, self.linear.weight, self.linear.bias)
        return self.norm(x * self.scale * self.computed + self.table + self.noise + self.projection).float()


def model():
    return nn.Sequential(Block(), nn.Linear(8, 8), nn.Linear(8, 8, bias=False))


RANDOM = ["0.linear.weight", "0.linear.bias", "0.embedding.weight", "0.noise", "1.weight", "1.bias", "2.weight"]


@pytest.fixture(autouse=True)
def no_hook_is_left():
    yield
    assert not torch_module._global_forward_pre_hooks


def traces(module):
    """Tensors that are not what torch makes."""
    return [name for name, each in registered(module).items() if type(each) not in (torch.Tensor, nn.Parameter)]


# What is left out ----------------------------------------------------------------------------------------------------


@over_dtypes
def test_what_is_random_is_left_out_and_all_else_is_there(dtype):
    with fastinit.on("cpu", dtype, seed=SEED, empty=True) as report:
        lazy = model()
    full = built(model, dtype)
    assert sorted(fastinit.uninitialized(lazy)) == sorted(RANDOM) == sorted(traces(lazy))
    expected = registered(full)
    for name, tensor in registered(lazy).items():
        other = expected[name]
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (other.shape, other.stride(), other.dtype), name
        assert tensor.device == other.device and tensor.requires_grad == other.requires_grad, name
        assert isinstance(tensor, nn.Parameter) == isinstance(other, nn.Parameter), name
        assert name in RANDOM or same_bits(tensor, other), name
    assert report.fills_deferred == len(RANDOM) + 1  # the row of zeros in the embedding
    assert "8 deferred" in str(report)


@pytest.mark.parametrize("constructor", [pytest.param(c, id=name) for name, c in module_cases()])
def test_every_module_of_torch_is_the_same_once_it_is_initialized(constructor):
    lazy = emptied(constructor, "bf16")
    written = fastinit.initialize(lazy)
    assert_same_structure(lazy, built(constructor, "bf16"))
    assert_same_bits(lazy, built(constructor, "bf16"))
    assert set(written) <= random_names(constructor) | {name for name, _ in lazy.named_buffers()}
    assert not fastinit.uninitialized(lazy)


@pytest.mark.parametrize("constructor", [lambda: nn.Linear(300, 200), lambda: nn.LSTM(8, 8, 2), model])
def test_no_random_fill_is_executed(constructor):
    reports, alive = [], []
    for empty in (False, "unchecked", True):
        with fastinit.on("cpu", "bf16", seed=1, empty=empty) as report:
            alive.append(constructor())
        reports.append(report)
    full, unchecked, marked = reports
    assert unchecked.fills_executed == marked.fills_executed < full.fills_executed
    assert full.fills_executed - marked.fills_executed == marked.fills_deferred == unchecked.fills_deferred


def test_what_no_checkpoint_can_hold_is_not_left_out():
    with fastinit.on("cpu", seed=SEED, empty=True):
        outside = torch.randn(100)
        holder = nn.Module()
        holder.attribute = torch.randn(100)
        holder.register_buffer("buffer", torch.randn(100), persistent=False)
    assert not fastinit.uninitialized(holder)
    for tensor in (outside, holder.attribute, holder.buffer):
        assert tensor.abs().max() < 6 and tensor.std() > 0.5


def test_parameters_that_share_a_storage_are_written_together_or_part_by_part():
    def parts():
        module = nn.Module()
        whole = torch.randn(4, 8)
        module.upper = nn.Parameter(whole[:2])
        module.whole = nn.Parameter(whole)
        return module

    lazy = emptied(parts)
    assert fastinit.uninitialized(lazy) == ["upper", "whole"]
    assert fastinit.initialize(lazy, ["upper"]) == ["upper"]
    assert not fastinit.uninitialized(lazy)
    assert_same_bits(lazy, built(parts))
    lazy = emptied(parts)
    nn.init.ones_(lazy.upper)
    assert fastinit.uninitialized(lazy) == ["whole"] and type(lazy.upper) is nn.Parameter
    fastinit.initialize(lazy)
    assert lazy.whole.data_ptr() == lazy.upper.data_ptr() and (lazy.whole[:2] == 1).all()
    assert same_bits(lazy.whole[2:], built(parts).whole[2:])


def test_a_parameter_that_its_module_never_writes_is_unwritten_too():
    def forgetful():
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(100))
        return module

    lazy = emptied(forgetful)
    assert fastinit.uninitialized(lazy) == ["weight"]
    with pytest.warns(UserWarning, match=r"model\.weight .* never initialized"):
        fastinit.initialize(lazy)
    assert not lazy.weight.any()


@over_dtypes
def test_nan_is_everywhere_if_asked_for(dtype):
    lazy = emptied(model, dtype, empty="nan")
    assert sorted(fastinit.uninitialized(lazy)) == sorted(RANDOM)
    for name, tensor in registered(lazy).items():
        assert tensor.isnan().all() if name in RANDOM else not tensor.isnan().any(), name
    assert lazy[1](X.to(DTYPES[dtype])).isnan().all()
    assert sorted(fastinit.uninitialized(lazy)) == sorted(RANDOM)
    fastinit.initialize(lazy)
    assert_same_bits(lazy, built(model, dtype))


def test_unchecked_keeps_nothing_and_checks_nothing():
    lazy = emptied(model, empty="unchecked")
    assert not traces(lazy) and not fastinit.uninitialized(lazy) and not torch_module._global_forward_pre_hooks
    assert_same_structure(lazy, built(model))
    assert not fastinit.initialize(lazy)
    lazy(X)


@pytest.mark.parametrize("value", ["NaN", None, 1, "yes"])
def test_another_value_of_empty_is_refused(value):
    with pytest.raises(ValueError, match="empty="):
        fastinit.on("cpu", empty=value)


def test_a_tensor_that_is_read_in_the_context_is_written():
    def reads():
        module = model()
        module.norm_of_first = module[1].weight.norm().item()
        return module

    lazy, full = emptied(reads), built(reads)
    assert lazy.norm_of_first == full.norm_of_first
    assert "1.weight" not in fastinit.uninitialized(lazy) and same_bits(lazy[1].weight, full[1].weight)


@pytest.mark.parametrize("elements", [1, 2, 3, 4, 5, 6, 7, 100])
def test_tensors_of_any_size_are_told_apart(elements):
    def constructor():
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(elements))
        return module

    lazy = emptied(constructor, "fp16")
    assert fastinit.uninitialized(lazy) == ["weight"]
    nn.init.ones_(lazy.weight)
    assert not fastinit.uninitialized(lazy)


# Initialized later ---------------------------------------------------------------------------------------------------


@over_dtypes
def test_those_that_are_named_are_initialized(dtype):
    lazy, full = emptied(model, dtype), built(model, dtype)
    assert fastinit.initialize(lazy, ["1.weight", "0.table", "0.scale"]) == ["1.weight"]
    assert same_bits(lazy[1].weight, full[1].weight)
    assert set(fastinit.uninitialized(lazy)) == set(RANDOM) - {"1.weight"}
    nn.init.ones_(lazy[1].weight)
    assert fastinit.initialize(lazy, "1.weight") == [] and (lazy[1].weight == 1).all()


@over_dtypes
def test_the_missing_keys_of_a_partial_checkpoint_are_initialized(dtype):
    source = built(model, "fp32", seed=7).state_dict()
    checkpoint = {name: source[name] for name in ("1.weight", "1.bias", "0.table", "0.noise")}
    lazy = emptied(model, dtype)
    missing = lazy.load_state_dict(checkpoint, strict=False).missing_keys
    fastinit.initialize(lazy, missing)
    full = built(model, dtype)
    with torch.no_grad():
        for name, value in checkpoint.items():
            registered(full)[name].copy_(value)
    assert_same_bits(lazy, full)
    lazy[0](X.to(DTYPES[dtype]))


def test_what_else_has_written_is_left_alone():
    lazy = emptied(model)
    nn.init.ones_(lazy[2].weight)
    assert set(fastinit.initialize(lazy)) == set(RANDOM) - {"2.weight"}
    assert (lazy[2].weight == 1).all() and same_bits(lazy[1].weight, built(model)[1].weight)


def test_unknown_names_are_refused_and_nothing_is_written():
    lazy = emptied(model)
    with pytest.raises(ValueError, match=r"names=nowhere\.weight are not parameters or buffers of this Sequential"):
        fastinit.initialize(lazy, ["1.weight", "nowhere.weight"])
    assert sorted(fastinit.uninitialized(lazy)) == sorted(RANDOM)


PARTS = {
    "rows": lambda w: w[2:5].fill_(2),
    "columns": lambda w: w[:, ::3].copy_(torch.full((8, 3), 2.0)),
    "one": lambda w: w[7].__setitem__(7, 2.0),
    "positions": lambda w: w.__setitem__((torch.tensor([0, 5]), torch.tensor([1, 1])), 2.0),
    "a mask": lambda w: w.masked_fill_(torch.eye(8, dtype=torch.bool), 2.0),
    "scatter": lambda w: w.scatter_(1, torch.tensor([[3], [4]]), 2.0),
    "index_fill": lambda w: w.index_fill_(0, torch.tensor([1, 6]), 2.0),
    "index_copy": lambda w: w.index_copy_(1, torch.tensor([1, 6]), torch.full((8, 2), 2.0)),
    "an out argument": lambda w: torch.add(torch.ones(2, 8), 1.0, out=w[:2]),
    "a transposed view": lambda w: w.t()[3:].fill_(2),
    "a diagonal": lambda w: w.diagonal().fill_(2),
    "a flat part": lambda w: w.view(-1)[10:30].fill_(2),
    "state_dict": lambda w: w.detach()[4:].copy_(torch.full((4, 8), 2.0)),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_was_written_in_part_is_neither_used_nor_lost(part):
    lazy, full = emptied(lambda: nn.Linear(8, 8, bias=False)), built(lambda: nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        PARTS[part](lazy.weight)
        PARTS[part](full.weight)
    assert fastinit.uninitialized(lazy) == ["weight"]
    with pytest.raises(RuntimeError, match=r"weight .* only in part"):
        lazy(X)
    again = pickle.loads(pickle.dumps(copy.deepcopy(lazy)))
    for each in (lazy, again, emptied(lambda: nn.Linear(8, 8, bias=False))):
        if each is not lazy and each is not again:
            with torch.no_grad():
                PARTS[part](each.weight)
        assert fastinit.initialize(each) == ["weight"]
        assert_same_bits(each, full)
        assert_same_structure(each, full)


def test_parts_that_cover_a_tensor_make_it_real():
    lazy = emptied(lambda: nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        for row in (3, 0, 7, 1, 2):
            lazy.weight[row] = float(row)
        lazy.weight[4:7, :5] = 1
        assert fastinit.uninitialized(lazy) == ["weight"]
        lazy.weight[3:7, 4:] = 2
    assert not fastinit.uninitialized(lazy) and type(lazy.weight) is nn.Parameter
    assert lazy.weight[0].eq(0).all() and lazy.weight[5].tolist() == [1] * 4 + [2] * 4


def tied():
    module = nn.ModuleDict({"embedding": nn.Embedding(20, 8), "head": nn.Linear(8, 20, bias=False)})
    module["head"].weight = module["embedding"].weight
    return module


@pytest.mark.parametrize("name", ["head.weight", "embedding.weight", None])
def test_a_tied_tensor_is_one_under_any_of_its_names(name):
    lazy = emptied(tied, "bf16")
    assert fastinit.uninitialized(lazy) == ["embedding.weight"]
    assert len(fastinit.initialize(lazy, name)) == 1
    assert_same_structure(lazy, built(tied, "bf16"))
    assert_same_bits(lazy, built(tied, "bf16"))


@over_dtypes
def test_a_weight_that_is_turned_or_squeezed_in_place_is_left_out_too(dtype):
    def constructor():
        module = nn.Module()
        module.turned = nn.Parameter(torch.empty(3, 4).normal_().t_())
        module.squeezed = nn.Parameter(torch.rand(1, 4).squeeze_(0))
        return module

    made, expected = emptied(constructor, dtype), built(constructor, dtype)
    assert fastinit.uninitialized(made) == fastinit.initialize(made) == ["turned", "squeezed"]
    assert made.turned.stride() == (1, 4) and made.squeezed.shape == (4,)
    assert_same_bits(made, expected)


def test_layers_that_were_deep_copied_in_the_constructor_are_left_out_too():
    def encoder():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    lazy = emptied(encoder)
    assert "layers.1.linear1.weight" in fastinit.uninitialized(lazy)
    fastinit.initialize(lazy)
    assert_same_bits(lazy, built(encoder))


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to(torch.float64),
        lambda module: module.to(memory_format=torch.channels_last),
        lambda module: module.requires_grad_(False),
        lambda module: copy.deepcopy(module),
        lambda module: pickle.loads(pickle.dumps(module)),
    ],
)
def test_recipes_survive_what_is_done_to_a_model(change):
    def convolution():
        return nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(4, 2))

    changed, full = change(emptied(convolution)), change(built(convolution))
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert fastinit.uninitialized(changed) == names
    assert fastinit.initialize(changed) == names
    assert_same_structure(changed, full)
    assert_same_bits(changed, full)


def test_a_part_of_a_model_can_be_initialized_alone():
    lazy = emptied(model)
    assert sorted(fastinit.initialize(lazy[1])) == ["bias", "weight"]
    assert same_bits(lazy[1].weight, built(model)[1].weight)
    rest = {f"inner.{name}" for name in RANDOM if not name.startswith("1.")}
    assert set(fastinit.uninitialized(nn.ModuleDict({"inner": lazy}))) == rest


# Written by others ---------------------------------------------------------------------------------------------------


def _safetensors(lazy, state, path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, path / "model.safetensors")
    safetensors.load_model(lazy, path / "model.safetensors")


def _distributed_checkpoint(lazy, state, path):
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=path / "dcp")
    target = lazy.state_dict()
    dcp.load(target, checkpoint_id=path / "dcp")


def _each(write):
    def load(lazy, state, path):
        for name, tensor in lazy.state_dict(keep_vars=True).items():
            with torch.no_grad():
                write(tensor, state[name])

    return load


def _vector(lazy, state, path):
    vector = torch.cat([state[name].flatten() for name, _ in lazy.named_parameters()])
    torch.nn.utils.vector_to_parameters(vector, lazy.parameters())
    lazy.load_state_dict({name: state[name] for name, _ in lazy.named_buffers() if name in state}, strict=False)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "load",
    [
        lambda lazy, state, path: lazy.load_state_dict(state),
        lambda lazy, state, path: lazy.load_state_dict(state, assign=True),
        _safetensors,
        _distributed_checkpoint,
        _vector,
        _each(lambda tensor, value: tensor.copy_(value)),
        _each(lambda tensor, value: tensor.data.copy_(value)),
        _each(lambda tensor, value: tensor.zero_().add_(value)),
        _each(lambda tensor, value: tensor.set_(value.clone())),
        _each(lambda tensor, value: setattr(tensor, "data", value.clone())),
    ],
)
def test_a_checkpoint_is_noticed_by_whichever_path_it_comes(load, tmp_path):
    lazy, full = emptied(model), built(model, seed=9)
    load(lazy, full.state_dict(), tmp_path)
    assert not fastinit.uninitialized(lazy) and not fastinit.initialize(lazy)
    assert torch.isfinite(lazy(X)).all()
    assert not traces(lazy)


# The first use -------------------------------------------------------------------------------------------------------


def test_a_forward_names_what_is_unwritten():
    lazy = emptied(model)
    with pytest.raises(RuntimeError, match=r"fastinit: 0\.linear\..* nothing has written"):
        lazy(X)
    fastinit.initialize(lazy, [name for name in RANDOM if name != "0.linear.weight"])
    for use in (lambda: lazy(X), lambda: lazy[0](X), lambda: lazy[0].linear(X)):
        with pytest.raises(RuntimeError, match=r"fastinit: 0\.linear\.weight .* fastinit\.initialize\(model\)"):
            use()
    lazy[1](X)


def test_a_model_that_is_written_has_no_trace():
    lazy = emptied(model)
    fastinit.initialize(lazy)
    assert not traces(lazy)
    assert not any("fastinit" in name for module in lazy.modules() for name in vars(module))
    assert all(type(each) is nn.Parameter and not vars(each) for each in lazy.parameters())


def test_other_models_are_not_in_the_way():
    waiting, lazy, other = emptied(model), emptied(model, seed=1), built(model)
    other(X)
    fastinit.initialize(lazy)
    lazy(X)
    assert len(fastinit.uninitialized(waiting)) == len(RANDOM)
    with pytest.raises(RuntimeError, match="nothing has written"):
        waiting(X)


def test_a_wrapper_of_the_model_is_refused_too():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return nn.functional.linear(x, self.inner[2].weight)

    wrapper = Wrapper(emptied(model))
    with pytest.raises(RuntimeError, match=r"2\.weight"):
        wrapper(X)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("how", ["wrapped", "in place", "inner"])
def test_compiled_models_are_checked_and_compiled_once(how):
    torch._dynamo.reset()
    lazy = emptied(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    if how == "wrapped":
        compiled = torch.compile(lazy, backend=backend)
    elif how == "in place":
        lazy.compile(backend=backend)
        compiled = lazy
    else:
        compiled = torch.compile(lambda x: lazy(x), backend=backend)
    with pytest.raises(Exception, match=r"0\.(weight|bias).*nothing has written"):
        compiled(X)
    fastinit.initialize(lazy)
    graphs.clear()
    expected = built(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))(X)
    for _ in range(3):
        assert torch.equal(compiled(X), expected)
    assert len(graphs) <= 3
    nn.Identity()(X)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_and_export_take_the_model():
    constructor = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU())  # noqa: E731
    expected = built(constructor)(X)
    for transform in (torch.jit.script, lambda module: torch.jit.trace(module, (X,))):
        lazy = emptied(constructor)
        fastinit.initialize(lazy)
        assert torch.equal(transform(lazy)(X), expected)
    with pytest.raises(RuntimeError, match="nothing has written"):
        torch.jit.trace(emptied(constructor), (X,))
    lazy = emptied(constructor)
    fastinit.initialize(lazy)
    assert torch.equal(torch.export.export(lazy, (X,)).module()(X), expected)


def test_function_transforms_and_fake_tensors_do_not_count_as_use():
    lazy, full = emptied(model), built(model)
    values = {**dict(full.named_parameters()), **dict(full.named_buffers())}
    full.eval(), lazy.eval()
    each = torch.func.vmap(lambda x: torch.func.functional_call(lazy, values, (x[None],)))(X)
    assert torch.allclose(each.flatten(), full(X).flatten())
    assert torch.equal(torch.func.functional_call(lazy, values, (X,)), full(X))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        lazy(torch.ones(2, 8))
    assert len(fastinit.uninitialized(lazy)) == len(RANDOM)


def test_a_written_model_is_saved_without_fastinit(tmp_path):
    lazy = emptied(lambda: nn.Linear(4, 4))
    fastinit.initialize(lazy)
    torch.save(lazy, tmp_path / "model.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False); model(torch.ones(4)); "
        "assert not any(name.startswith('fastinit') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_an_unwritten_model_stays_one_when_it_is_saved_and_loaded():
    file = io.BytesIO()
    torch.save(emptied(model), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with pytest.raises(RuntimeError, match="nothing has written"):
        again(X)
    fastinit.initialize(again)
    assert_same_bits(again, built(model))


def test_an_exception_in_the_context_leaves_no_hook():
    with pytest.raises(KeyError), fastinit.on("cpu", empty=True):
        model()
        raise KeyError


def test_a_context_inside_of_an_empty_one_has_its_own_mode():
    with fastinit.on("cpu", seed=1, empty=True):
        with fastinit.on("cpu", seed=2):
            inner = nn.Linear(4, 4)
        outer = nn.Linear(4, 4)
    assert not fastinit.uninitialized(inner) and same_bits(inner.weight, built(lambda: nn.Linear(4, 4), seed=2).weight)
    assert fastinit.uninitialized(outer) == ["weight", "bias"]
    fastinit.initialize(outer)
    assert same_bits(outer.weight, built(lambda: nn.Linear(4, 4), seed=1).weight)


def test_an_engine_is_given_every_parameter_and_the_report_counts_what_it_takes_over():
    class Engine:
        def begin(self):
            return lambda: None

        def place(self, parameters, timing):
            self.parameters = [(type(owner), name, deferred is not None) for owner, name, _, deferred in parameters]
            for *_, parameter, _ in parameters:
                torch._C._swap_tensor_impl(parameter, nn.Parameter(torch.empty(0)))

    engine = Engine()
    with fastinit.on("cpu", "bf16", shard=engine) as report:
        made = Block()
    assert (nn.Linear, "weight", True) in engine.parameters and (Block, "computed", False) in engine.parameters
    assert len(engine.parameters) == len(list(made.parameters())) == 7
    assert report.parameters == sum(p.numel() for p in built(Block).parameters()) and made.linear.weight.numel() == 0


class Chain(nn.Module):
    def __init__(self, length):
        super().__init__()
        weight = torch.randn(4, 4)
        for _ in range(length):
            weight = torch.tanh(weight * 1.5)
        self.weight = nn.Parameter(weight)


@pytest.mark.parametrize("length", [1, 20, 500])
def test_a_long_computation_on_random_values_is_done_in_time(length):
    model = emptied(lambda: Chain(length))
    fastinit.initialize(model)
    assert_same_bits(model, built(lambda: Chain(length)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_torch_refuses_is_refused_where_it_is_called(dtype):
    def constructor():
        weight = torch.randn(5, 5)
        with pytest.raises(RuntimeError, match="must match"):
            weight.add_(torch.randn(5, 7))
        with pytest.raises(RuntimeError, match="must match"):
            weight.copy_(torch.randn(5, 3))
        layer = nn.Linear(5, 5, bias=False)
        layer.weight = nn.Parameter(weight)
        return layer

    model = emptied(constructor, dtype)
    fastinit.initialize(model)
    assert_same_bits(model, built(constructor, dtype))
