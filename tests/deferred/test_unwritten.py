"""What `empty` and `shard` leave unwritten, and every public way in which a model can change or be used meanwhile.

Wherever an unwritten parameter goes, it is pending, written with the values that it was to have, or refused by name;
and never raw memory.
"""

import copy
import gc
import io
import pickle
import re
import warnings
import weakref

import pytest
import torch
from models import SEED, built, registered, same_bits
from torch import nn
from torch.nn.utils import parametrize, prune

import fastinit

X = torch.ones(3, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.register_buffer("noise", torch.randn(8))

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) + self.noise


NAMES = ["first.weight", "first.bias", "second.weight", "noise"]


@pytest.fixture(params=["empty", "shard"])
def make(request):
    """A function that makes the model with nothing random in it written."""
    torch.full((64, 64), 7e20)  # what freed memory may hold

    def make(constructor=Net):
        with fastinit.on("cpu", seed=SEED, **{request.param: True}):
            return constructor()

    make.names = NAMES if request.param == "empty" else NAMES[:3]
    make.shards = request.param == "shard"
    return make


def finished(model):
    """The model with its values, whoever gives them."""
    fastinit.materialize(model)
    return model


def assert_values(model, dtype=torch.float32):
    expected = {**dict(built(Net).named_parameters()), **dict(built(Net).named_buffers())}
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert type(tensor) in (nn.Parameter, torch.Tensor), name
        assert same_bits(tensor, expected[name].to(dtype)), name


# --- where it goes ----------------------------------------------------------------------------------------------------


def _swapped(model):
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                other = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
                torch.utils.swap_tensors(parameter, other)
                module._parameters[name] = other
    return model


def _with_flag(set_flag, convert):
    def change(model):
        set_flag(True)
        try:
            return convert(model)
        finally:
            set_flag(False)

    return change


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _through_another_module(model):
    model.first, model.second = model.second, model.first
    other = nn.Linear(1, 1)
    other.weight, other.bias = model.second.weight, model.second.bias
    model.second, model.first = model.first, other
    return model


def _moved_to_meta_and_back(model):
    return model.to("meta").to_empty(device="cpu")


CHANGES = {
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "to meta and to_empty": _moved_to_meta_and_back,
    "to the CPU": lambda m: m.to("cpu"),
    "double and back": lambda m: m.double().float(),
    "overwriting conversion": _with_flag(
        torch.__future__.set_overwrite_module_params_on_conversion, lambda m: m.double().float()
    ),
    "swapping conversion": _with_flag(
        torch.__future__.set_swap_module_params_on_conversion, lambda m: m.double().float()
    ),
    "swapping to_empty": _with_flag(
        torch.__future__.set_swap_module_params_on_conversion, lambda m: m.to_empty(device="cpu")
    ),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _saved,
    "swap_tensors": _swapped,
    "another module": _through_another_module,
    "a new parameter": lambda m: m.second.register_parameter("weight", nn.Parameter(m.second.weight)) or m,
    "requires_grad_": lambda m: m.requires_grad_(False).requires_grad_(True),
    "train": lambda m: m.eval().train(),
    "compile": lambda m: m.compile() or m,
    "its own state dict": lambda m: m.load_state_dict(m.state_dict(), assign=True) and m,
    "data": lambda m: setattr(m.second.weight, "data", m.second.weight.data) or m,
    "set_": lambda m: m.second.weight.data.set_(m.second.weight.data) is None or m,
    "hooks": lambda m: m.second.weight.register_hook(lambda g: g) and m,
    "zero_grad": lambda m: m.zero_grad() or m,
    "named views": lambda m: [p[0] for p in m.parameters()] and m,
}


@pytest.mark.filterwarnings("ignore:fastinit. .* is saved without values")
@pytest.mark.parametrize("change", CHANGES)
def test_it_stays_unwritten_and_is_written_right_wherever_it_goes(make, change):
    model = CHANGES[change](make())
    assert sorted(fastinit.uninitialized(model)) == sorted(make.names)
    with pytest.raises(RuntimeError, match=r"fastinit: .*(first|second)\.\w+ .*was created without values"):
        model(X)
    assert_values(finished(model))


# Those that are not about the layers of the other model here.
KEEPING = [name for name in CHANGES if name != "another module" and "second" not in CHANGES[name].__code__.co_names]


class Buffers(nn.Module):
    """Buffers of several dtypes, one of a transposed matrix, and parameters that the constructor computes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.decay = nn.Parameter(torch.log(torch.arange(1, 9).float()))
        self.register_buffer("positions", torch.arange(8))
        self.register_buffer("mask", torch.ones(8, 8).tril().bool())
        self.register_buffer("table", torch.outer(torch.arange(3), 1 / torch.arange(1, 9)).t(), persistent=False)
        self.register_buffer("noise", torch.randn(8))


@pytest.mark.filterwarnings("ignore:fastinit. .* is saved without values")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("change", KEEPING)
def test_what_has_values_in_a_model_of_shards_keeps_them_whoever_gives_it_memory(change, dtype):
    with fastinit.on("cpu", dtype, seed=SEED, shard=True):
        model = Buffers()
    model = CHANGES[change](model)
    fastinit.materialize(model)
    expected = registered(built(Buffers, dtype))
    found = registered(model)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert type(tensor) in (nn.Parameter, torch.Tensor) and not vars(tensor), name
        assert same_bits(tensor, expected[name].to(tensor.dtype)), name
        assert tensor.stride() == expected[name].stride(), name


@pytest.mark.filterwarnings("ignore:fastinit. .* is saved without values")
def test_a_conversion_to_half_precision_rounds_once(make):
    model = make().to(torch.bfloat16)
    assert sorted(fastinit.uninitialized(model)) == sorted(make.names)
    assert_values(finished(model), torch.bfloat16)


def test_a_tie_made_after_the_block_is_one_tensor(make):
    model = make()
    model.second.weight = model.first.weight
    assert set(fastinit.uninitialized(model)) == {*make.names} - {"second.weight"}
    finished(model)
    assert model.second.weight is model.first.weight and same_bits(model.first.weight, built(Net).first.weight)


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(torch.zeros(2, 8))

    def forward(self, x):
        return nn.functional.linear(x, self.weight + self.down.t().repeat(1, 4), self.bias)


def test_an_adapter_takes_it_over(make):
    model = make()
    model.first = Adapter(model.first)
    assert "first.weight" in fastinit.uninitialized(model)
    with pytest.raises(RuntimeError, match=r"first\.weight"):
        model(X)
    finished(model)
    assert same_bits(model.first.weight, built(Net).first.weight)


def test_copies_are_written_apart(make):
    model = make()
    average = copy.deepcopy(model)
    finished(model)
    assert sorted(fastinit.uninitialized(average)) == sorted(make.names)
    with torch.no_grad():
        model.first.weight.zero_()
    assert_values(finished(average))


def test_hooks_and_gradients_stay_with_it(make):
    model, calls = make(), []
    model.first.weight.register_hook(lambda gradient: calls.append("hook") or gradient * 0)
    model.first.weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("post"))
    if not make.shards:
        model.first.bias.grad = torch.ones(8)
    finished(model)(X).sum().backward()
    assert calls == ["hook", "post"] or calls == ["post", "hook"]
    assert not model.first.weight.grad.any()
    assert make.shards or not torch.equal(model.first.bias.grad, built(Net).first.bias)


def test_hooks_of_the_constructor_stay_with_it(make):
    calls = []

    class Hooked(Net):
        def __init__(self):
            super().__init__()
            self.first.weight.register_hook(lambda gradient: calls.append("hook"))
            self.first.weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("post"))

    model = make(Hooked)
    fastinit.materialize(model, "cpu", empty=True)
    finished(model)(X).sum().backward()
    assert sorted(calls) == ["hook", "post"]


def test_a_gradient_stays_behind_where_its_tensor_changes_the_device(make):
    class Started(Net):
        def __init__(self):
            super().__init__()
            self.first.weight.grad = torch.ones(8, 8)

    model = make(Started)
    assert (model.first.weight.grad is None) == make.shards
    model.second.weight.grad = torch.zeros_like(model.second.weight)
    fastinit.materialize(model, "cpu", empty=True)
    assert (model.second.weight.grad is None) == make.shards
    assert_values(finished(model))


def test_its_data_may_have_another_dtype_but_no_other_device(make):
    weight = make().first.weight
    with pytest.raises(RuntimeError, match=r"first\.weight is on '(cpu|meta)', and the data that it is to take on"):
        weight.data = torch.ones(8, 8, device="cpu" if make.shards else "meta")
    weight.data = torch.ones(8, 8, dtype=torch.float16, device=weight.device)
    assert type(weight) is nn.Parameter and weight.dtype == torch.float16


def test_its_type_makes_parameters_as_loaders_ask_for(make):
    weight = make().first.weight
    for given, options in (((False,), {}), ((), {"requires_grad": False})):
        made = type(weight)(torch.ones(2), *given, **options)
        assert type(made) is nn.Parameter and not made.requires_grad and made.tolist() == [1, 1]


def test_views_that_nobody_has_any_more_are_gone(make):
    weight = make().first.weight
    first = weakref.ref(weight[0])
    for _ in range(200):
        weight[0]
    assert first() is None


def test_one_that_a_vector_of_parameters_or_an_assignment_writes_is_written(make):
    model = make()
    model.second.weight = nn.Parameter(torch.ones(8, 8))
    assert set(fastinit.uninitialized(model)) == {*make.names} - {"second.weight"}
    finished(model)
    assert (model.second.weight == 1).all()


# --- who uses it ------------------------------------------------------------------------------------------------------


class Halve(nn.Module):
    def forward(self, x):
        return x / 2


def _with_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones(parameter.shape, device=parameter.device)
    return model.parameters()


@torch.library.custom_op("fastinit_tests::total", mutates_args=())
def total(x: torch.Tensor) -> torch.Tensor:
    return x.sum()


class Weight(torch.Tensor):
    pass


def _safetensors(model, path):
    from safetensors.torch import save_file

    save_file({"weight": model.state_dict()["first.weight"].to("cpu")}, path / "model.safetensors")


def _distributed_checkpoint(model, path):
    import torch.distributed.checkpoint as dcp

    dcp.save(dict(model.named_parameters()), checkpoint_id=path / "dcp")


USES = {
    "forward": lambda m, p: m(X),
    "a forward without gradients": lambda m, p: torch.no_grad()(m)(X),
    "inference mode": lambda m, p: torch.inference_mode()(m)(X),
    "another order in inference mode": lambda m, p: torch.inference_mode()(lambda w: w.t().reshape(64))(m.first.weight),
    "a submodule": lambda m, p: m.second(X),
    "its function": lambda m, p: nn.functional.linear(X, m.first.weight),
    "a traced module": lambda m, p: torch.jit.trace(m, (X,)),
    "a compiled module": lambda m, p: torch.compile(m, backend="eager")(X),
    "vmap": lambda m, p: torch.vmap(m)(X),
    "SGD": lambda m, p: torch.optim.SGD(_with_gradients(m), 0.1).step(),
    "AdamW": lambda m, p: torch.optim.AdamW(_with_gradients(m), 0.1, foreach=True).step(),
    "weight decay": lambda m, p: torch._foreach_mul_([p.data for p in m.parameters()], 0.5),
    "numpy": lambda m, p: m.first.weight.detach().numpy(),
    "array": lambda m, p: __import__("numpy").asarray(m.first.weight.detach()),
    "dlpack": lambda m, p: torch.utils.dlpack.from_dlpack(m.first.weight.detach()),
    "tolist": lambda m, p: m.first.weight.tolist(),
    "item": lambda m, p: m.first.weight[0, 0].item(),
    "a format": lambda m, p: f"{m.first.weight[0, 0]:.3f}",
    "a list of numbers": lambda m, p: torch.tensor([m.first.weight[0, 0], 1.0]),
    "bool": lambda m, p: bool(m.first.weight[0, 0] > 0),
    "in place": lambda m, p: m.first.weight.data.mul_(2),
    "a slice in place": lambda m, p: m.first.weight.data[0].add_(2),
    "adding at places": lambda m, p: m.first.weight.data.index_put_(
        (torch.tensor([0]),), torch.ones(8), accumulate=True
    ),
    "scatter_add": lambda m, p: m.first.weight.data.scatter_add_(
        0, torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8)
    ),
    "a copy of it": lambda m, p: torch.zeros(8, 8).copy_(m.first.weight.detach()),
    "data of another tensor": lambda m, p: setattr(torch.zeros(8, 8), "data", m.first.weight),
    "data of another parameter": lambda m, p: setattr(nn.Linear(8, 8).weight, "data", m.first.weight.data[:4]),
    "data by an operator": lambda m, p: torch.ops.aten.set_data(torch.zeros(8, 8), m.first.weight),
    "data in inference mode": lambda m, p: torch.inference_mode()(setattr)(torch.zeros(1), "data", m.first.weight),
    "memory of another tensor": lambda m, p: torch.zeros(8, 8).set_(m.first.weight.detach()),
    "a subclass": lambda m, p: m.first.weight.as_subclass(Weight),
    "a parameter of a subclass": lambda m, p: torch.Tensor._make_subclass(Weight, m.first.weight),
    "cat": lambda m, p: torch.cat([m.first.weight, m.second.weight]),
    "parameters_to_vector": lambda m, p: nn.utils.parameters_to_vector(m.parameters()),
    "clip": lambda m, p: nn.utils.clip_grads_with_norm_(_with_gradients(m), 1.0, m.first.weight.norm()),
    "a custom operator": lambda m, p: total(m.first.weight),
    "a parametrization": lambda m, p: parametrize.register_parametrization(m.first, "weight", Halve()),
    "weight_norm": lambda m, p: nn.utils.parametrizations.weight_norm(m.first),
    "prune": lambda m, p: prune.l1_unstructured(m.first, "weight", amount=2),
    "share_memory": lambda m, p: m.share_memory(),
    "storage": lambda m, p: m.first.weight.untyped_storage(),
    "safetensors": _safetensors,
    "a distributed checkpoint": _distributed_checkpoint,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", USES)
def test_whoever_uses_it_is_refused_by_its_name(make, use, tmp_path):
    model = make()
    refused = r"fastinit: (first|second)\.(weight|bias) .*was created without values"
    if make.shards and use.startswith("data"):
        refused = "incompatible tensor type"  # torch's own refusal: the other tensor is not on the meta device
    # Exceptions of others wrap ours; that of a distributed checkpoint is no Exception.
    with pytest.raises(BaseException, match=refused):
        USES[use](model, tmp_path)
    model = make()
    finished(model)
    USES[use](model, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_scripted_modules_are_refused_and_the_log_tells_what_torchscript_leaves_out(make, caplog):
    scripted = torch.jit.script(make())
    with caplog.at_level("INFO", "fastinit"):
        with pytest.raises(RuntimeError, match="failed in the TorchScript interpreter"):
            scripted(X)
    assert re.search(r"fastinit: first\.(weight|bias) .*was created without values", caplog.text)


def test_torchscript_saves_no_memory_of_what_is_unwritten(make):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(make()), file)
    file.seek(0)
    with pytest.raises(RuntimeError, match="storage only has 0 bytes"):
        torch.jit.load(file)


def test_whoever_asks_for_an_address_gets_initialized_memory():
    with fastinit.on("cpu", seed=SEED, empty=True):
        model = Net()
    assert model.first.weight.data_ptr() == model.first.weight.untyped_storage().data_ptr()
    assert type(model.first.weight) is nn.Parameter and same_bits(model.first.weight, built(Net).first.weight)


def test_who_was_refused_leaves_no_mark(make, tmp_path):
    model = make()
    for refused in (lambda: model.first.weight.untyped_storage(), lambda: _safetensors(model, tmp_path)):
        with pytest.raises(RuntimeError, match=r"first\.weight .*was created without values"):
            refused()
    finished(model)
    assert not vars(model.first.weight)


def test_tensors_of_other_kinds_are_made_like_it(make):
    weight = make().first.weight
    mask = torch.empty_like(weight, dtype=torch.bool)
    assert type(mask) is torch.Tensor and mask.shape == (8, 8) and mask.device == weight.device
    numbers = torch.randint_like(weight, 3, 4, device="cpu")
    assert type(numbers) is torch.Tensor and (numbers == 3).all() and numbers.dtype == weight.dtype
    assert not hasattr(weight, "__cuda_array_interface__")


def test_saving_it_warns_by_name_and_a_written_one_is_saved_without_fastinit(make):
    model = make()
    with pytest.warns(UserWarning, match=r"fastinit: first\.weight is saved without values"):
        pickle.dumps(model.first.weight)
    finished(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert b"fastinit.record" not in pickle.dumps(model)


def test_it_is_shown_without_values_and_has_no_memory_of_a_special_kind(make):
    model = make()
    assert "unwritten 'first.weight', size=(8, 8)" in repr(model.first.weight)
    assert "Linear(in_features=8" in repr(model)
    assert not model.first.weight.is_pinned() and not model.first.weight.is_shared()


def test_shapes_are_known_to_fake_tensors(make):
    model = make()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.ones(3, 8, device=model.first.weight.device))
        assert nn.functional.linear(x, model.first.weight).shape == (3, 8)
    assert sorted(fastinit.uninitialized(model)) == sorted(make.names)


class Seen(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_methods_that_skip_torchs_dispatcher_give_the_same_and_modes_see_them(make):
    weight = make().first.weight.data
    calls = {
        "narrow": lambda: weight.narrow(0, 2, 4),
        "view": lambda: weight.view(4, -1),
        "new_zeros": lambda: weight.new_zeros(torch.Size((3, 8))),
        "copy_": lambda: torch.empty_like(weight).copy_(weight),
    }
    for name, call in calls.items():
        quick = call()
        with Seen() as mode:
            usual = call()
        assert name in mode.names
        assert repr(quick) == repr(usual) and quick.stride() == usual.stride()
        assert quick.storage_offset() == usual.storage_offset()
    with pytest.raises(IndexError, match="Dimension out of range"):
        weight.narrow(5, 0, 1)


def test_what_is_written_to_the_meta_device_is_refused_and_not_lost_in_silence():
    with fastinit.on("cpu", seed=SEED, shard=True):
        model = Net()
    with pytest.raises(RuntimeError, match=r"'first.weight' is on the meta device.*materialize\(model, empty=True\)"):
        nn.init.zeros_(model.first.weight)
    state = built(Net, seed=3).state_dict()
    with pytest.raises(RuntimeError, match="on the meta device"):
        model.load_state_dict(state)
    fastinit.materialize(model, empty=True)
    model.load_state_dict(state)
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())


# --- wrappers of torch.distributed ------------------------------------------------------------------------------------


@pytest.fixture
def one_rank():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_collectives_and_data_parallelism_are_refused(make, one_rank):
    import torch.distributed as dist

    for use in (
        lambda m: dist.all_reduce(m.first.weight.data),
        lambda m: dist.broadcast(m.first.weight.data, 0),
        lambda m: dist.all_gather([torch.zeros(8, 8)], m.first.weight.data),
        lambda m: nn.parallel.DistributedDataParallel(m),
        lambda m: torch.distributed.fsdp.FullyShardedDataParallel(m, device_id=torch.device("cpu"))(X),
    ):
        # FSDP1 asks for a function that gives parameters on the meta device their values.
        refused = r"fastinit: (first|second)\.\w+ .*without values|reset_parameters|meta tensors"
        with pytest.raises(Exception, match=refused):
            use(make())


def test_fully_sharded_parameters_stay_unwritten(make, one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(make(), mesh=init_device_mesh("cpu", (1,)))
    assert [name for name in fastinit.uninitialized(model) if name != "noise"] == NAMES[:3]
    finished(model)
    whole = built(Net)
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.to_local(), whole.get_parameter(name)), name
    assert torch.equal(model(X), whole(X))


def test_what_was_kept_is_ordinary_once_nothing_is_unwritten():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("table", torch.arange(3.0).cos(), persistent=False)

    state = nn.Linear(3, 3).state_dict(prefix="linear.")
    for assign in (False, True):
        with fastinit.on("cpu", "fp32", shard=True):
            model = Net()
        assert torch.equal(torch.empty_like(input=model.table), torch.arange(3.0).cos())
        model.to_empty(device="cpu")
        model.load_state_dict(state, assign=assign)
        gc.collect()  # tensors that nothing refers to but what they stood for
        assert type(model.table) is torch.Tensor and not vars(model.table)
        assert torch.equal(model.table, torch.arange(3.0).cos())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_another_block_has_pending_may_become_the_data_of_what_is_unwritten(dtype):
    with fastinit.on("cpu", dtype, seed=SEED, empty=True):
        layer = nn.Linear(4, 4)
    with fastinit.on("cpu", dtype, seed=SEED):
        values = torch.randn(20)
        nn.utils.vector_to_parameters(values, layer.parameters())
    assert type(layer.weight) is nn.Parameter and not fastinit.uninitialized(layer)
    assert torch.equal(nn.utils.parameters_to_vector(layer.parameters()), values)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_of_a_view_may_be_initialized_in_another_block(dtype):
    with fastinit.on("cpu", dtype, seed=SEED, shard=True):
        layer = nn.Linear(4, 4)
    with torch.no_grad(), fastinit.on("cpu", dtype, seed=SEED):
        nn.init.zeros_(layer.weight.t()[1])
    fastinit.materialize(layer)
    assert layer.weight[:, 1].tolist() == [0.0] * 4
    assert not fastinit.uninitialized(layer)
