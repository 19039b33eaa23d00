"""The model that comes out of a block is torch's alone: whatever torch does with a model, it does with this one.

Each use is carried out on two models of the same values, one that fastinit made and one that torch made, and both have
to give the same. Then: modules that get their tensors late, or in the place of others (lazy modules, parametrizations,
pruning, `skip_init`), inside of the block and after it.
"""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from models import (
    DTYPES,
    SEED,
    WAYS,
    assert_same_bits,
    assert_same_structure,
    built,
    made,
    plain,
    registered,
    same_bits,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_leaves

import fastinit

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in ("Lazy modules", "`torch.jit", "Using `torch.compile")
]
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


class Net(nn.Module):
    """Random, constant and computed tensors, a tie, a frozen parameter, and buffers that are saved or are not."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12)
        self.down = nn.Linear(12, 8, bias=False)
        nn.init.trunc_normal_(self.down.weight, std=0.3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.decay = nn.Parameter(-torch.exp(torch.arange(8.0) / 8), requires_grad=False)
        self.register_buffer("noise", torch.rand(8))
        self.register_buffer("table", torch.arange(8.0) / 4, persistent=False)

    def forward(self, tokens):
        hidden = self.embedding(tokens).mean(1) + self.noise + self.table
        return self.head(self.down(torch.relu(self.norm(self.up(hidden)))) * self.decay)


TOKENS = torch.arange(12).view(4, 3) % 11


def twin_of(model, constructor, dtype="fp32"):
    """The model as torch makes it, with the same values."""
    twin = plain(constructor, dtype)
    with torch.no_grad():
        for name, tensor in registered(twin).items():
            tensor.copy_(registered(model)[name])
    return twin


# --- no trace ---------------------------------------------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_fastinit_is_left_in_a_model(way, dtype):
    model = made(Net, way, dtype)
    theirs = plain(Net, dtype)
    model(TOKENS), theirs(TOKENS)  # with empty=True, the first use removes what is kept
    assert_same_structure(model, theirs)
    for (name, ours), (_, expected) in zip(model.named_modules(), theirs.named_modules(), strict=True):
        assert type(ours) is type(expected) and list(vars(ours)) == list(vars(expected)), name
        for key, value in vars(expected).items():
            assert type(vars(ours)[key]) is type(value), (name, key)
    for name, tensor in registered(model).items():
        expected = registered(theirs)[name]
        assert type(tensor) is type(expected) and vars(tensor) == vars(expected) == {}, name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0
        assert tensor.grad is None and tensor.is_leaf and tensor.grad_fn is None and not tensor._backward_hooks
        assert weakref.getweakrefcount(tensor) == 0, name
    assert b"fastinit" not in pickle.dumps(model)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_is_freed_with_its_last_reference(way):
    model = made(Net, way)
    model(TOKENS)
    tensors = [weakref.ref(tensor) for tensor in registered(model).values()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(ref() is not None for ref in tensors)
    finally:
        gc.enable()


# --- what torch does with models --------------------------------------------------------------------------------------

USES = {}


def use(function):
    """Add a function of a model, which returns tensors, to the table; it may change the model."""
    USES[function.__name__] = function
    return function


@use
def forward(model):
    return model(TOKENS)


@use
def deep_copy(model):
    copied = copy.deepcopy(model)
    assert copied.head.weight is copied.embedding.weight
    assert copied.up.weight.data_ptr() != model.up.weight.data_ptr()
    return copied(TOKENS), dict(copied.state_dict())


@use
def pickled(model):
    return dict(pickle.loads(pickle.dumps(model)).state_dict())


@use
def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(TOKENS)


@use
def saved_state(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


@use
def loaded_state(model):
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    assert not any(model.load_state_dict(state))
    model.load_state_dict({name: tensor + 1 for name, tensor in state.items()}, assign=True)
    return model(TOKENS)


@use
def state_dict_hooks(model):
    seen = []
    model.register_state_dict_post_hook(lambda module, state, prefix, meta: state.update({"extra": module.noise * 2}))
    model.up.register_state_dict_pre_hook(lambda module, prefix, keep: seen.append(prefix))
    model.register_load_state_dict_pre_hook(lambda module, state, *_: state.pop("extra"))
    model.register_load_state_dict_post_hook(lambda module, keys: seen.append(keys.missing_keys))
    state = model.state_dict()
    model.load_state_dict(state)
    assert seen == ["up.", []]
    return dict(state)


@use
def forward_and_backward_hooks(model):
    seen = []
    model.up.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    model.down.register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
    model.up.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    model(TOKENS).square().sum().backward()
    assert len(seen) == 3
    return seen


@use
def conversions(model):
    results = [dict(model.to(torch.float64).state_dict())]
    model.table = model.table.double()
    results.append(model(TOKENS))
    results += [dict(model.half().state_dict()), dict(model.bfloat16().state_dict()), dict(model.float().state_dict())]
    assert model.head.weight is model.embedding.weight
    return results


@use
def to_meta_and_back(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = model.table.clone()
    model.to("meta")
    assert model.up.weight.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    model.table.copy_(table)
    return model(TOKENS)


@use
def applied(model):
    @torch.no_grad()
    def halve(module):
        if isinstance(module, nn.Linear):
            module.weight.mul_(0.5)

    return model.apply(halve)(TOKENS), [parameter.clone() for parameter in model.parameters()]


@use
def swapped_on_conversion(model):
    # torch swaps tensors that nobody else refers to.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return dict(model.state_dict())


def _train(model, optimizer):
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()
    return dict(model.state_dict())


@use
def optimizers(model):
    results = []
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    ):
        results.append(_train(copied := copy.deepcopy(model), optimizer := make(copied.parameters())))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        results.append(_train(copied, optimizer))
    return results


@use
def clipped_and_averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    _train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    average.update_parameters(model)
    return norm, dict(average.state_dict()), nn.utils.parameters_to_vector(model.parameters())


@use
def functional_calls(model):
    model.eval()
    values = {name: tensor * 2 for name, tensor in model.named_parameters()}
    gradients = torch.func.grad(lambda v: torch.func.functional_call(model, v, (TOKENS,)).square().sum())(values)
    return torch.func.functional_call(model, values, (TOKENS,)), gradients


@use
def ensembles(model):
    models = [model.eval(), copy.deepcopy(model).eval()]
    with torch.no_grad():
        models[1].up.weight.mul_(2)
    parameters, buffers = torch.func.stack_module_state(models)

    def call(parameters, buffers):
        return torch.func.functional_call(model, (parameters, buffers), (TOKENS,))

    return torch.func.vmap(call)(parameters, buffers), parameters


@use
def second_derivatives(model):
    model.eval()
    (first,) = torch.autograd.grad(model(TOKENS).pow(3).sum(), model.up.weight, create_graph=True)
    return torch.autograd.grad(first.square().sum(), model.up.weight)


@use
def compiled(model):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    function = torch.compile(model.eval(), backend=backend, fullgraph=True)
    results = [function(TOKENS), function(TOKENS)]
    assert len(graphs) == 1
    torch._dynamo.reset()
    return results


@use
def compiled_training(model):
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    model(TOKENS).square().sum().backward()
    torch._dynamo.reset()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@use
def exported(model):
    program = torch.export.export(model.eval(), (TOKENS,))
    return program.module()(TOKENS), dict(program.state_dict)


@use
def traced(model):
    return torch.jit.trace(model.eval(), (TOKENS,))(TOKENS)


@use
def scripted(model):
    scripted = torch.jit.script(model.eval())
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return scripted(TOKENS), torch.jit.load(file)(TOKENS)


@use
def symbolically_traced(model):
    return torch.fx.symbolic_trace(model.eval())(TOKENS)


@use
def pruned(model):
    prune.l1_unstructured(model.up, "weight", amount=0.5)
    result = model(TOKENS)
    return result, dict(prune.remove(model.up, "weight").state_dict())


@use
def parametrized(model):
    parametrizations.weight_norm(model.up)
    with torch.random.fork_rng():  # it draws what a square matrix has more
        torch.manual_seed(0)
        parametrizations.orthogonal(model.down)
    result, state = model.eval()(TOKENS), dict(model.state_dict())
    parametrize.remove_parametrizations(model.up, "weight")
    return result, state, model(TOKENS)


@use
def rearranged(model):
    model.up = nn.utils.fuse_linear_bn_eval(model.eval().up, model.norm)
    model.norm = nn.Identity()
    del model.noise
    model.register_buffer("noise", torch.zeros(8))
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model(TOKENS), dict(model.state_dict())


@use
def read_without_a_copy(model):
    array = model.up.weight.detach().numpy()
    array[0] = 7
    shared = torch.from_dlpack(model.up.bias.detach())
    shared.fill_(2)
    return model.up.weight, model.up.bias


@use
def fake(model):
    with torch._subclasses.FakeTensorMode() as mode:
        faked = {name: mode.from_tensor(tensor) for name, tensor in registered(model).items()}
        shape = torch.func.functional_call(model.eval(), faked, (mode.from_tensor(TOKENS),)).shape
    return torch.tensor(shape)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", USES)
def test_a_model_is_used_like_any_other(name, way):
    model = made(Net, way)
    twin = twin_of(model, Net)
    ours, theirs = tree_leaves(USES[name](model)), tree_leaves(USES[name](twin))
    assert ours and len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other) and same_bits(one, other)


def test_the_memory_of_a_model_is_shared_with_another_process():
    model = made(Net, "at once").share_memory()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    # The other process gets the model itself and writes into its memory.
    process = torch.multiprocessing.get_context("spawn").Process(target=nn.Module.load_state_dict, args=(model, state))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert all(tensor.is_shared() for tensor in model.state_dict().values())
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())


# --- tensors that come late, or in the place of others ----------------------------------------------------------------

X = torch.linspace(-1, 1, 24).view(4, 6)


def lazy():
    return nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 3))


@over_dtypes
@pytest.mark.parametrize("way", WAYS)
def test_lazy_modules_are_initialized_by_torch_if_the_first_forward_is_after_the_block(way, dtype):
    model, theirs = made(lazy, way, dtype), plain(lazy, dtype)
    assert_same_structure(model, theirs)
    assert nn.parameter.is_lazy(model[0].weight)
    for each in (model, theirs):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            each(X.to(DTYPES[dtype]))
    assert type(model[0]) is nn.Linear
    assert_same_structure(model, theirs)
    assert_same_bits(model[:2], theirs[:2])
    assert_same_bits(model[2], made(lazy, way, dtype)[2])


@over_dtypes
def test_lazy_modules_are_initialized_by_the_block_if_the_first_forward_is_in_it(dtype):
    def construct():
        model = lazy()
        model(X.to(DTYPES[dtype]))
        return model

    model = built(construct, dtype)
    assert_same_structure(model, plain(construct, dtype))
    # Streams count fills: the last layer's are made first.
    bound = 6**-0.5
    weight = fastinit.fill_(torch.empty(5, 6), fastinit.Uniform(-bound, bound), seed=SEED, stream=2)
    assert same_bits(model[0].weight.detach(), weight.to(DTYPES[dtype]))


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x):
        return x.triu()


def symmetric(layer):
    return parametrize.register_parametrization(layer, "weight", Symmetric())


CHANGES = {
    "orthogonal": parametrizations.orthogonal,
    "cayley": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "householder": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "custom": symmetric,
    "two": lambda layer: symmetric(parametrizations.spectral_norm(layer)),
    "undone": lambda layer: parametrize.remove_parametrizations(parametrizations.weight_norm(layer), "weight"),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    "pruned in rows": lambda layer: prune.ln_structured(layer, "weight", amount=0.3, n=2, dim=0),
    "pruned for good": lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", amount=0.3), "weight"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHANGES)
def test_parametrized_and_pruned_modules_are_the_same_in_every_way(name, way):
    def construct():
        torch.manual_seed(0)  # spectral_norm draws a vector
        return CHANGES[name](nn.Linear(6, 6))

    model, expected = made(construct, way), built(construct)
    assert_same_structure(model, plain(construct))
    assert_same_bits(model, expected)
    model(X).square().sum().backward()
    stored = made(construct, way, "bf16")
    assert_same_bits(stored, built(construct, "bf16"))
    if name not in ("cayley", "householder"):  # which torch computes in full precision alone
        assert torch.isfinite(stored(X.bfloat16())).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHANGES)
def test_modules_are_parametrized_and_pruned_after_the_block_as_ever(name, way):
    def construct():
        return nn.Linear(6, 6)

    model = made(construct, way)
    twin = twin_of(model, construct)
    for each in (model, twin):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            CHANGES[name](each)
    assert_same_structure(model, twin)
    assert_same_bits(model, twin)
    assert torch.equal(model(X), twin(X))


def skipped():
    return nn.utils.skip_init(nn.Linear, 300, 200)


@over_dtypes
def test_what_skip_init_leaves_out_is_zero_unless_it_is_written(dtype):
    with pytest.warns(UserWarning) as warned:
        model = built(skipped, dtype)
    messages = sorted(str(warning.message) for warning in warned)
    for message, shape in zip(messages, ["(200, 300)", "(200,)"], strict=True):
        assert f"a parameter of shape {shape} is never initialized" in message
    assert_same_structure(model, plain(skipped, dtype))
    assert not model.weight.any() and not model.bias.any()

    def initialized():
        model = skipped()
        nn.init.normal_(model.weight, std=0.02)
        nn.init.zeros_(model.bias)
        return model

    with fastinit.on("cpu", dtype, seed=SEED) as report, warnings.catch_warnings():
        warnings.simplefilter("error")
        model = initialized()
    assert report.fills_executed == 2 and report.fills_dropped == 0
    # The layer's own init has drawn two streams on meta.
    weight = fastinit.fill_(torch.empty(200, 300), fastinit.Normal(0, 0.02), seed=SEED, stream=2)
    assert same_bits(model.weight.detach(), weight.to(DTYPES[dtype])) and not model.bias.any()


@pytest.mark.parametrize("way", ["empty", "sharded"])
def test_what_skip_init_leaves_out_is_named_where_it_may_come_later(way):
    with fastinit.on("cpu", "bf16", **WAYS[way]):
        model = skipped()
    assert fastinit.uninitialized(model) == ["weight", "bias"]
    with pytest.warns(UserWarning, match="never initialized"):
        assert fastinit.materialize(model) == ["weight", "bias"]
    assert not model.weight.any()


@over_dtypes
def test_a_model_that_skip_init_made_is_loaded_in_the_block(dtype):
    state = plain(lambda: nn.Linear(300, 200), seed=3).state_dict()

    def construct():
        model = skipped()
        model.load_state_dict(state)
        return model

    with fastinit.on("cpu", dtype, seed=SEED) as report, warnings.catch_warnings():
        warnings.simplefilter("error")
        model = construct()
    assert report.fills_executed == 0
    assert_same_bits(model, plain(construct, dtype))


@over_dtypes
def test_a_module_that_comes_off_meta_in_the_block_is_initialized_by_its_own_functions(dtype):
    def construct():
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(30, 20), nn.LayerNorm(20))
        model.to_empty(device="cpu")
        for layer in model:
            layer.reset_parameters()
        return model

    model = built(construct, dtype)
    assert_same_structure(model, plain(construct, dtype))
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in (model[0].weight, model[0].bias))
    assert (model[1].weight == 1).all() and not model[1].bias.any()
