"""Checkpoints that are loaded inside the context, by every path: no fill runs for what they supply.

Each path is compared with torch alone, which runs the same constructor and the same load: structure and values have to
be the same. What the checkpoint does not supply has the bits of a full init without the load, and takes the only fills
that run, as the context's report says.
"""

import functools
import json
import subprocess
import sys
import warnings

import pytest
import torch
from models import (
    DTYPES,
    HALVES,
    SEED,
    assert_rounded_once,
    assert_same_bits,
    assert_same_distribution,
    assert_same_structure,
    built,
    plain,
    registered,
    same_bits,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastinit

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "torch.distributed is disabled",
        "torch.quantize_per_tensor",
        "enable_nested_tensor",
        "Lazy modules",
        "Found keys that are in the model state dict",
    )
]
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


class Net(nn.Module):
    """Random, constant and computed tensors, a tie, a frozen parameter, buffers that are saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 16))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("noise", torch.rand(16))
        self.register_buffer("table", torch.arange(16.0) / 3, persistent=False)


def checkpoint(constructor=Net):
    """The state dict of a model that torch made in fp32, with other values than any init gives; half ones round."""
    state = plain(constructor, seed=7).state_dict()
    return {name: tensor * 1.01 + 0.1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def loaded(constructor, load, dtype, seed=SEED):
    """Create a model in the context and load it there; return it with the report."""
    with fastinit.on("cpu", dtype, seed=seed) as report:
        model = created_and_loaded(constructor, load)
    return model, report


def created_and_loaded(constructor, load):
    """Return `constructor()` after `load`, which changes the model it is given or returns another."""
    model = constructor()
    result = load(model)
    return result if isinstance(result, nn.Module) else model


def assert_loads(constructor, load, dtype, missing=(), also_filled=0):
    """Fail unless `load(model)` does in the context what it does in torch, `missing` keeps its init, and nothing else
    is filled, but for `also_filled` writes of tensors that the constructor reads."""
    model, report = loaded(constructor, load, dtype)
    reference = plain(functools.partial(created_and_loaded, constructor, load), dtype)
    full = built(constructor, dtype)
    assert_same_structure(model, reference)
    tensors, supplied, initialized = registered(model), registered(reference), registered(full)
    # Computed values are better than those of torch, where torch computes in half precision.
    unsaved = tensors.keys() - model.state_dict().keys()
    for name, tensor in tensors.items():
        expected = initialized if name in missing or name in unsaved else supplied
        assert same_bits(tensor, expected[name]), name
    fills = {id(tensors[name]) for name in missing if tensors[name].is_floating_point()}
    assert report.fills_executed == len(fills) + also_filled, str(report)
    return model


# What torch offers ----------------------------------------------------------------------------------------------------

PATHS = {}
BUFFERS = ("body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked", "noise")
SOME = ("body.0.weight", "body.1.running_var", "frozen", "noise")
TIE = ("embedding.weight", "head.weight")


def path(*missing):
    """Add a way to write a state dict into a Net to the table, with the names that it leaves as they are."""

    def add(write):
        PATHS[write.__name__] = (write, missing)
        return write

    return add


@path()
def load_state_dict(model, state):
    model.load_state_dict(state)


@path()
def load_state_dict_assign(model, state):
    model.load_state_dict(state, assign=True)


@path(*SOME)
def load_state_dict_partial(model, state):
    model.load_state_dict({name: state[name] for name in state if name not in SOME}, strict=False)


@path(*SOME)
def load_state_dict_partial_assign(model, state):
    model.load_state_dict({name: state[name] for name in state if name not in SOME}, strict=False, assign=True)


@path("head.weight", "embedding.weight", "norm.weight", "norm.bias", "frozen", "noise")
def load_state_dict_of_a_submodule(model, state):
    model.body.load_state_dict({name[5:]: state[name] for name in state if name.startswith("body.")})


@path()
def load_state_dict_twice(model, state):
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    model.load_state_dict(state)


@path()
def load_state_dict_of_data_parallel(model, state):
    nn.DataParallel(model).load_state_dict({f"module.{name}": tensor for name, tensor in state.items()})


@path()
def prefix_stripped(model, state):
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
    model.load_state_dict(state)


@path()
def copy_into_data(model, state):
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data.copy_(state[name])


@path()
def copy_under_no_grad(model, state):
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(state[name])


@path()
def copy_into_the_state_dict(model, state):
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[name])


@path()
def copy_into_a_transposed_view(model, state):
    model.load_state_dict(state)
    model.body[0].weight.data.t().copy_(state["body.0.weight"].t() * 2)


@path()
def assign_to_all_of_data(model, state):
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data[...] = state[name]


@path()
def assign_to_a_full_slice(model, state):
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor[(slice(None),) * tensor.dim()] = state[name]


@path(*BUFFERS)
def replace_data(model, state):
    for name, parameter in model.named_parameters():
        parameter.data = state[name]


@path(*BUFFERS)
def replace_data_by_what_is_converted(model, state):
    for name, parameter in model.named_parameters():
        parameter.data = state[name].to(parameter.dtype)


@path(*BUFFERS)
def replace_parameters(model, state):
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(state[name].to(parameter), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), leaf, value)
    model.head.weight = model.embedding.weight


@path(*BUFFERS)
def vector_to_parameters(model, state):
    vector = torch.cat([state[name].flatten() for name, _ in model.named_parameters()])
    nn.utils.vector_to_parameters(vector, model.parameters())


@path(*BUFFERS)
def vector_to_parameters_of_the_models_dtype(model, state):
    vector = torch.cat([state[name].flatten() for name, _ in model.named_parameters()])
    nn.utils.vector_to_parameters(vector.to(model.frozen.dtype), model.parameters())


@path()
def data_in_fp64(model, state):
    model.load_state_dict({n: t.double() if t.is_floating_point() else t for n, t in state.items()})


@path()
def data_in_fp16(model, state):
    model.load_state_dict({n: t.half() if t.is_floating_point() else t for n, t in state.items()})


@path()
def data_in_bf16(model, state):
    model.load_state_dict({n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()})


@path()
def data_in_int8(model, state):
    state["body.0.weight"] = torch.arange(384, dtype=torch.int8).view(24, 16)
    model.load_state_dict(state)


@path()
def data_in_views_of_one_tensor(model, state):
    flat = torch.cat([tensor.flatten().float() for tensor in state.values()])
    pieces = flat.split([tensor.numel() for tensor in state.values()])
    model.load_state_dict({n: piece.view(state[n].shape) for n, piece in zip(state, pieces, strict=True)})


@path()
def data_that_is_not_contiguous(model, state):
    model.load_state_dict({n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in state.items()})


@path()
def data_that_is_expanded(model, state):
    state["body.0.weight"] = state["body.0.weight"][:, :1].expand(24, 16)
    state["noise"] = state["noise"][0].expand(16)
    model.load_state_dict(state)


@path()
def a_tie_after_the_load(model, state):
    model.head.weight = nn.Parameter(torch.randn(40, 16))
    model.load_state_dict(state)
    model.head.weight = model.embedding.weight


@path()
def a_tie_that_the_load_makes(model, state):
    model.head.weight = nn.Parameter(torch.randn(40, 16))
    model.load_state_dict({**state, "head.weight": state["embedding.weight"]})
    model.head.weight = model.embedding.weight


@over_dtypes
@pytest.mark.parametrize("name", PATHS)
def test_what_a_checkpoint_supplies_is_not_filled(name, dtype):
    write, missing = PATHS[name]
    state = checkpoint()
    assert_loads(Net, lambda model: write(model, dict(state)), dtype, missing)


# Special modules: constructor, constructor of the checkpoint's model, load, missing names, fills of what the
# constructor reads or the load writes in pieces.
CASES = {}


def case(*missing, constructor, source=None, also_filled=0):
    """Add a load of a special module to the table."""

    def add(load):
        CASES[load.__name__] = (constructor, source or constructor, load, missing, also_filled)
        return load

    return add


def linear():
    return nn.Linear(16, 24)


def lstm():
    return nn.LSTM(7, 11, 2)


def transformer():
    return nn.Transformer(16, 2, 1, 1, dim_feedforward=24)


def weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(linear())


def parametrized_weight_norm():
    return parametrizations.weight_norm(linear())


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x):
        return x.triu()


def symmetric():
    return parametrize.register_parametrization(nn.Linear(24, 24), "weight", Symmetric())


class Renamed(nn.Linear):
    """A module that converts the layout of an older version when it is loaded."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel").t()
        super()._load_from_state_dict(state_dict, prefix, *args)


class Extra(nn.Linear):
    """A module with state that is no tensor of the model."""

    extra = 0.0

    def get_extra_state(self):
        return {"extra": self.extra}

    def set_extra_state(self, state):
        self.extra = state["extra"]
        self.extra_tensor = torch.tensor([self.extra])


@case(constructor=lstm)
def of_an_lstm(model, state):
    model.load_state_dict(state)


@case(constructor=lstm)
def of_an_lstm_assign(model, state):
    model.load_state_dict(state, assign=True)


@case(constructor=transformer)
def of_a_transformer(model, state):
    model.load_state_dict(state)


# weight_norm takes the norm of the weight, so its values have to be there.
@case(constructor=weight_norm, also_filled=1)
def of_weight_norm(model, state):
    model.load_state_dict(state)


@case(constructor=parametrized_weight_norm, also_filled=1)
def of_parametrized_weight_norm(model, state):
    model.load_state_dict(state)


# A parametrization is a module that is called, under autograd, and so ends the recording of what came before.
@case(constructor=symmetric, also_filled=1)
def of_a_parametrized_module(model, state):
    model.load_state_dict(state)


@case("bias", constructor=symmetric, source=linear, also_filled=1)
def by_assignment_to_a_parametrized_weight(model, state):
    model.weight = state["weight"][:, :1].expand(24, 24).to(model.bias.dtype)


@case(constructor=lambda: nn.utils.skip_init(nn.Linear, 16, 24), source=linear)
def of_skip_init(model, state):
    model.load_state_dict(state)


@case(constructor=lambda: nn.LazyLinear(24), source=linear)
def of_a_lazy_linear(model, state):
    model.load_state_dict(state)


@case(constructor=lambda: nn.LazyLinear(24), source=linear)
def of_a_lazy_linear_assign(model, state):
    model.load_state_dict(state, assign=True)


@case(constructor=nn.LazyBatchNorm1d, source=lambda: nn.BatchNorm1d(24))
def of_a_lazy_batch_norm(model, state):
    model.load_state_dict(state)


@case(constructor=lambda: nn.Sequential(Renamed(16, 24)), source=linear)
def through_an_override_of_load_from_state_dict(model, state):
    model.load_state_dict({"0.kernel": state["weight"].t().contiguous(), "0.bias": state["bias"]})


@case("bias", constructor=linear)
def through_hooks(model, state):
    def double(module, state_dict, prefix, *args):
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2

    model.register_load_state_dict_pre_hook(double)
    model.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    model.load_state_dict({"weight": state["weight"]})


@case(constructor=lambda: Extra(16, 24), source=linear)
def of_extra_state(model, state):
    model.load_state_dict({**state, "_extra_state": {"extra": 3.0}})
    assert model.extra == 3.0 and model.extra_tensor.tolist() == [3.0]


@case(constructor=lambda: nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)), source=Net)
def of_a_model_that_is_tied_afterwards(model, state):
    model.load_state_dict({"0.weight": state["embedding.weight"]}, strict=False)
    model[1].weight = model[0].weight


# No piece covers the weight, so its init runs once, before the first of them.
@case(constructor=linear, also_filled=1)
def in_pieces(model, state):
    model.weight.data[:12].copy_(state["weight"][:12])
    model.weight.data[12:] = state["weight"][12:]
    model.bias.data.copy_(state["bias"])


@over_dtypes
@pytest.mark.parametrize("name", CASES)
def test_special_modules_load_as_in_torch(name, dtype):
    constructor, source, load, missing, also_filled = CASES[name]
    state = checkpoint(source)
    assert_loads(constructor, lambda model: load(model, dict(state)), dtype, missing, also_filled)


@over_dtypes
def test_parameters_to_vector_reads_the_values_of_the_init(dtype):
    vectors = []

    def through_a_vector(model):
        vector = nn.utils.parameters_to_vector(model.parameters())
        vectors.append(vector.detach())
        nn.utils.vector_to_parameters(vector.detach() * 2, model.parameters())

    model, _ = loaded(Net, through_a_vector, dtype)
    full = built(Net, dtype)
    assert same_bits(vectors[0], nn.utils.parameters_to_vector(full.parameters()))
    assert all(same_bits(p, 2 * q) for p, q in zip(model.parameters(), full.parameters(), strict=True))


@over_dtypes
def test_a_load_that_raises_leaves_no_raw_memory(dtype):
    state = checkpoint()
    quantized = torch.quantize_per_tensor(torch.ones(24, 16), 0.1, 0, torch.qint8)
    for bad in (torch.ones(3, 3), torch.ones(24, 16).to_sparse(), torch.empty(24, 16, device="meta"), quantized):

        def load(model, bad=bad):
            if bad.is_meta:
                # torch takes a tensor on meta for nothing to load, and only warns.
                with pytest.raises(NotImplementedError, match="meta"):
                    model.body[0].weight.data.copy_(bad)
                model.load_state_dict({n: t for n, t in state.items() if n != "body.0.weight"}, strict=False)
            else:
                with pytest.raises(RuntimeError, match=r"body\.0\.weight"):
                    model.load_state_dict({**state, "body.0.weight": bad})

        assert_loads(Net, load, dtype, missing=["body.0.weight"])


@over_dtypes
def test_a_strict_load_that_misses_keys_raises_and_the_model_is_whole(dtype):
    state = checkpoint()

    def load(model):
        with pytest.raises(RuntimeError, match=r'Missing key.*"noise"'):
            model.load_state_dict({name: state[name] for name in state if name not in SOME})

    assert_loads(Net, load, dtype, missing=SOME)


@over_dtypes
def test_a_copy_of_a_part_of_itself_is_carried_out(dtype):
    def load(model):
        with torch.no_grad():
            model.weight.copy_(model.weight[:1].expand_as(model.weight))
            model.bias[...] = model.bias[3]

    model, _ = loaded(linear, load, dtype)
    full = built(linear, dtype)
    assert same_bits(model.weight, full.weight[:1].expand(24, 16))
    assert same_bits(model.bias, full.bias[3].expand(24))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_loaded_model_converts_to_fp32_inside_the_context(dtype):
    state = checkpoint()
    half = {name: tensor.to(DTYPES[dtype]) for name, tensor in state.items()}

    def load(model):
        model.load_state_dict(state)
        assert half["noise"].float().dtype == half["noise"].type("torch.FloatTensor").dtype == torch.float32
        return model.float()

    model, report = loaded(Net, load, dtype)
    assert_same_structure(model, plain(Net))
    assert all(same_bits(tensor, half[name].float()) for name, tensor in model.state_dict().items() if tensor.dim())
    assert not report.fills_executed


@over_dtypes
def test_an_optimizer_of_the_model_is_left_alone(dtype):
    trained = plain(Net, dtype)
    for parameter in trained.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    other = torch.optim.AdamW(trained.parameters(), lr=0.2)
    other.step()
    state, states = checkpoint(), other.state_dict()
    optimizers = []

    def load(model):
        optimizers.append(torch.optim.AdamW(model.parameters(), lr=0.1))
        optimizers[-1].load_state_dict(states)
        model.load_state_dict(state)

    model = assert_loads(Net, load, dtype)
    ours, theirs = optimizers
    assert all(p is q for p, q in zip(ours.param_groups[0]["params"], model.parameters(), strict=True))
    assert ours.param_groups[0]["lr"] == 0.2 and len(ours.state) == len(states["state"])
    for one, two in zip(ours.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True):
        assert all(same_bits(one[key], two[key]) for key in one)


# Memory ---------------------------------------------------------------------------------------------------------------

_GROWTH = """
import sys, torch, fastinit
from torch import nn

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

def construct():
    return nn.Sequential(nn.Embedding(4000, 2000), *[nn.Linear(2000, 2000) for _ in range(4)])

way, path = sys.argv[1:]
with torch.device("meta"):
    shapes = {name: tensor.shape for name, tensor in construct().state_dict().items()}
state = {name: torch.full(shape, 0.3) for name, shape in shapes.items()}
if way == "mmap":
    torch.save(state, path)
    state = torch.load(path, mmap=True)
    assert all(tensor.sum() > 0 for tensor in state.values())  # its pages are in memory now
with fastinit.on("cpu", "bf16"):
    nn.Linear(2, 2)
before = status("VmRSS")
with fastinit.on("cpu", "bf16") as report:
    model = construct()
    if way == "setitem":
        for name, parameter in model.named_parameters():
            parameter.data[...] = state[name]
    else:
        model.load_state_dict(state, assign=way == "assign")
grown = status("VmHWM") - before
assert report.fills_executed == 0 and all((p == state[n].to(p.dtype)).all() for n, p in model.named_parameters())
print(grown, 0 if way == "assign" else report.bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["load_state_dict", "mmap", "setitem", "assign"])
def test_an_fp32_checkpoint_goes_into_a_bf16_model_without_a_second_model_in_memory(tmp_path, way):
    command = [sys.executable, "-c", _GROWTH, way, str(tmp_path / "state.pt")]
    grown, model = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    # The contract allows the largest tensor too (32 MB here); a conversion while copying needs none of it.
    assert grown <= model + (12 << 20), f"{grown / 2**20:.1f} MiB for a model of {model / 2**20:.1f} MiB"


# Files ----------------------------------------------------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"map_location": "cpu", "weights_only": True}], ids=str)
def test_files_of_torch(tmp_path, dtype, assign, options):
    torch.save(checkpoint(), tmp_path / "state.pt")

    def load(model):
        model.load_state_dict(torch.load(tmp_path / "state.pt", **options), assign=assign)

    assert_loads(Net, load, dtype)


@over_dtypes
def test_a_whole_model_that_was_pickled(tmp_path, dtype):
    torch.save(plain(Net, seed=3), tmp_path / "model.pt")
    state = checkpoint()

    def load(model):
        model = torch.load(tmp_path / "model.pt", weights_only=False)
        model.load_state_dict(state)
        return model

    model, report = loaded(nn.Identity, load, dtype)
    assert_same_bits(model, plain(lambda: load(None), dtype))
    assert not report.fills_executed


@over_dtypes
def test_files_of_safetensors(tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors.torch")
    state = checkpoint()
    del state["head.weight"]
    safetensors.save_file(state, tmp_path / "whole.safetensors")
    part = {name: tensor for name, tensor in state.items() if name not in SOME}
    safetensors.save_file(part, tmp_path / "part.safetensors")
    for name, missing in (("whole", ()), ("part", SOME)):
        file = tmp_path / f"{name}.safetensors"

        def load(model, file=file):
            model.load_state_dict(safetensors.load_file(file), strict=False)

        assert_loads(Net, load, dtype, missing)


@over_dtypes
def test_load_model_and_save_model_of_safetensors(tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors.torch")
    state = checkpoint()
    del state["head.weight"]
    safetensors.save_file(state, tmp_path / "state.safetensors")
    model, _ = loaded(Net, lambda model: safetensors.load_model(model, tmp_path / "state.safetensors"), dtype)
    assert_same_structure(model, plain(Net, dtype))
    expected = checkpoint()
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, expected[name].to(tensor.dtype)), name
    full, _ = loaded(Net, lambda model: safetensors.save_model(model, tmp_path / "full.safetensors"), dtype)
    assert_same_bits(full, built(Net, dtype))
    for name, tensor in safetensors.load_file(tmp_path / "full.safetensors").items():
        assert same_bits(tensor, full.state_dict()[name]), name


@over_dtypes
@pytest.mark.parametrize("whole", [True, False])
def test_distributed_checkpoints_load_into_the_state_dict(tmp_path, dtype, whole):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    state = checkpoint()
    missing = () if whole else SOME
    for name in missing:
        del state[name]
    dcp.save(state, checkpoint_id=tmp_path)

    def in_place(model):
        wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in missing}
        dcp.load(wanted, checkpoint_id=tmp_path)

    def with_helpers(model):
        wanted = get_model_state_dict(model)
        for name in missing:
            del wanted[name]
        dcp.load(wanted, checkpoint_id=tmp_path)
        model.load_state_dict(wanted, strict=False)
        if whole:
            set_model_state_dict(model, wanted)

    assert_loads(Net, in_place, dtype, missing)
    assert_loads(Net, with_helpers, dtype, missing)


# Lightning ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning_checkpoint(tmp_path_factory):
    """A LightningModule class, and the file that a Trainer saves of it."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, classes=2):
            super().__init__()
            self.save_hyperparameters()
            self.net = Net()
            self.classifier = nn.Linear(16, classes)

    trained = plain(lambda: Module(classes=3), seed=5)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(trained)
    file = tmp_path_factory.mktemp("lightning") / "model.ckpt"
    trainer.save_checkpoint(file)
    return Module, file


@over_dtypes
@pytest.mark.parametrize("options", [{}, {"map_location": "cpu"}, {"weights_only": True}], ids=str)
def test_load_from_checkpoint_of_lightning(lightning_checkpoint, dtype, options):
    module, file = lightning_checkpoint
    with fastinit.on("cpu", dtype, seed=SEED) as report:
        model = module.load_from_checkpoint(file, **options)
    reference = plain(lambda: module.load_from_checkpoint(file, **options), dtype)
    assert model.hparams == {"classes": 3}
    assert_same_structure(model, reference)
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, reference.state_dict()[name]), name
    assert report.fills_executed == 0, str(report)


@over_dtypes
def test_a_partial_checkpoint_of_lightning_leaves_the_init_of_the_rest(lightning_checkpoint, tmp_path, dtype):
    module, file = lightning_checkpoint
    content = torch.load(file, weights_only=False)
    del content["state_dict"]["classifier.weight"]
    torch.save(content, tmp_path / "part.ckpt")
    with fastinit.on("cpu", dtype, seed=SEED) as report:
        model = module.load_from_checkpoint(tmp_path / "part.ckpt", strict=False)
    assert same_bits(model.classifier.weight, built(lambda: module(classes=3), dtype).classifier.weight)
    assert same_bits(model.classifier.bias, content["state_dict"]["classifier.bias"].to(DTYPES[dtype]))
    assert report.fills_executed == 1


# transformers ---------------------------------------------------------------------------------------------------------


def _gpt2():
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=40)
    )


def _llama(tied=False):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def _pickled(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


# Name: constructor, dtype in which it is saved, how it is saved.
SAVED = {
    "gpt2": (_gpt2, "fp32", lambda model, folder: model.save_pretrained(folder)),
    "gpt2-pickled": (_gpt2, "fp32", _pickled),
    "llama": (_llama, "fp32", lambda model, folder: model.save_pretrained(folder)),
    "llama-tied": (functools.partial(_llama, True), "fp32", lambda model, folder: model.save_pretrained(folder)),
    "llama-bf16": (_llama, "bf16", lambda model, folder: model.save_pretrained(folder)),
    "llama-sharded": (_llama, "fp32", lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB")),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that gives the class and the folder of a saved model."""
    pytest.importorskip("transformers")

    @functools.cache
    def save(name):
        constructor, dtype, how = SAVED[name]
        folder = tmp_path_factory.mktemp(name)
        model = plain(constructor, dtype, seed=5)
        how(model, folder)
        return type(model), folder

    return save


NAMED = pytest.mark.parametrize("named", [None, "auto", torch.float32, torch.bfloat16, torch.float16], ids=str)


def from_pretrained(cls, folder, named=None, **options):
    """Call the library as users do, with the dtype as an argument or without."""
    return cls.from_pretrained(folder, **options, **({} if named is None else {"dtype": named}))


@over_dtypes
@NAMED
@pytest.mark.parametrize("name", SAVED)
def test_from_pretrained_gives_what_it_gives_without_the_context(saved, name, dtype, named):
    cls, folder = saved(name)
    if name == "llama-sharded":
        assert len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]) > 1
    with fastinit.on("cpu", dtype, seed=SEED) as report:
        model = from_pretrained(cls, folder, named)
    reference = plain(lambda: from_pretrained(cls, folder, named), dtype)
    assert_same_structure(model, reference)
    assert_same_bits(model, reference)
    assert report.fills_executed == 0, str(report)


@over_dtypes
@NAMED
def test_from_pretrained_initializes_a_new_head(saved, dtype, named):
    import transformers

    _, folder = saved("llama")
    cls = transformers.LlamaForSequenceClassification

    def load():
        return from_pretrained(cls, folder, named, num_labels=300)

    with fastinit.on("cpu", dtype, seed=SEED) as report:
        model = load()
    reference = plain(load, dtype)
    assert_same_structure(model, reference)
    for name, tensor in registered(model).items():
        assert same_bits(tensor, registered(reference)[name]) == (name != "score.weight"), name
    assert report.fills_executed == 1, str(report)
    assert_same_distribution(model.score.weight.detach().float(), reference.score.weight.detach().float())
    assert_same_bits(model, built(load, dtype))
    assert not same_bits(model.score.weight, built(load, dtype, seed=SEED + 1).score.weight)


def test_the_head_that_from_pretrained_initializes_is_that_of_fp32_rounded_once(saved):
    import transformers

    _, folder = saved("gpt2")

    def load():
        return transformers.GPT2ForTokenClassification.from_pretrained(folder, num_labels=300, dtype="auto")

    exact = built(load).classifier
    for dtype in HALVES:
        named = functools.partial(
            transformers.GPT2ForTokenClassification.from_pretrained, folder, num_labels=300, dtype=DTYPES[dtype]
        )
        assert_rounded_once(built(named, dtype).classifier, exact)


@over_dtypes
def test_from_pretrained_initializes_what_has_another_shape(saved, dtype):
    cls, folder = saved("llama")

    def load():
        return cls.from_pretrained(folder, vocab_size=120, ignore_mismatched_sizes=True)

    with fastinit.on("cpu", dtype, seed=SEED) as report:
        model = load()
    reference = plain(load, dtype)
    assert_same_structure(model, reference)
    assert_same_bits(model, built(load, dtype))
    new = {"model.embed_tokens.weight", "lm_head.weight"}
    for name, tensor in registered(model).items():
        theirs = registered(reference)[name]
        assert same_bits(tensor, theirs) == (name not in new), name
        if name in new:
            assert_same_distribution(tensor.detach().float(), theirs.detach().float(), name)
    assert report.fills_executed == len(new), str(report)


@over_dtypes
def test_a_state_dict_of_transformers_loads_into_a_model_that_the_context_makes(saved, dtype):
    safetensors = pytest.importorskip("safetensors.torch")
    _, folder = saved("llama")
    state = safetensors.load_file(folder / "model.safetensors")
    assert_loads(_llama, lambda model: model.load_state_dict(state), dtype)


@over_dtypes
def test_tensors_are_swapped_where_torch_is_asked_to_swap_them(dtype):
    state = checkpoint()

    def load(model):
        model.load_state_dict(state)

    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model, _ = loaded(Net, load, dtype)
        reference = plain(functools.partial(created_and_loaded, Net, load), dtype)
        converted, _ = loaded(Net, lambda model: model.to(torch.float64), dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same_structure(model, reference)
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, reference.state_dict()[name]), name
    assert converted.frozen.dtype == torch.float64 and not converted.frozen.requires_grad
