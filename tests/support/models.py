"""What the model tests share: building a model three ways, comparing the results bit by bit, and a table of modules.

A model is built by a *constructor*, a function without arguments, and compared between

- `built(constructor, ...)`, that is, inside `fastinit.on`;
- `plain(constructor, ...)`, torch alone under `torch.set_default_dtype(dtype)` and `torch.device(device)`, which
  defines the structure that fastinit has to reproduce and, in fp32, every value that no random number enters.
"""

import hashlib
import math
import warnings

import torch
from torch import nn

import fastinit
from fastinit.cli.measure import default_dtype

SEED = 0x5EED
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALVES = ("bf16", "fp16")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Block(nn.Module):
    """A residual block, of an odd number of hidden units."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width, bias=False)
        nn.init.trunc_normal_(self.down.weight, std=0.02)

    def forward(self, hidden):
        return hidden + self.down(nn.functional.gelu(self.up(self.norm(hidden))))


# Building -------------------------------------------------------------------------------------------------------------


def built(constructor, dtype="fp32", device="cpu", seed=SEED):
    """Return `constructor()` as made inside `fastinit.on(device, dtype, seed=seed)`."""
    with fastinit.on(device, dtype, seed=seed):
        return constructor()


WAYS = {"at once": {}, "empty": {"empty": True}, "sharded": {"shard": True}}


def made(constructor, way, dtype="fp32", device="cpu", seed=SEED, **options):
    """Return `constructor()` with all its values, as made in one of the WAYS, with options of `on`."""
    with fastinit.on(device, dtype, seed=seed, **WAYS[way], **options):
        model = constructor()
    if way == "empty":
        fastinit.initialize(model)
    elif way == "sharded":
        fastinit.materialize(model)
    return model


def plain(constructor, dtype="fp32", device="cpu", seed=0):
    """Return `constructor()` as torch alone makes it, leaving torch's random state as it was."""
    with torch.random.fork_rng(devices=[]), default_dtype(DTYPES.get(dtype, dtype)), torch.device(device):
        torch.manual_seed(seed)
        return constructor()


# Structure ------------------------------------------------------------------------------------------------------------


def registered(module):
    """Return every registered tensor by its full name, parameters and buffers, shared ones under each of their names.

    Unlike `state_dict` this has the non-persistent buffers too. Entries that are None are left out.
    """
    tensors = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for kind in (owner._parameters, owner._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return tensors


def structure(module):
    """Describe all that the first clause of the contract promises, except the values."""
    description = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for kind in (owner._parameters, owner._buffers):
            for name, tensor in kind.items():
                full = f"{prefix}.{name}" if prefix else name
                if tensor is None:
                    description[full] = None
                    continue
                lazy = nn.parameter.is_lazy(tensor)
                description[full] = {
                    "kind": "parameter" if kind is owner._parameters else "buffer",
                    "persistent": name not in owner._non_persistent_buffers_set,
                    "type": type(tensor),
                    "shape": None if lazy else tuple(tensor.shape),
                    "stride": None if lazy else tensor.stride(),
                    "dtype": tensor.dtype,
                    "device": tensor.device.type,
                    "requires_grad": tensor.requires_grad,
                    "leaf": tensor.is_leaf,
                }
    return description


def ties(module):
    """Return the groups of names that are one tensor object, and the groups whose storage is shared."""
    objects, storages = {}, {}
    for name, tensor in registered(module).items():
        objects.setdefault(id(tensor), []).append(name)
        if not nn.parameter.is_lazy(tensor) and tensor.numel():
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return [sorted(group for group in groups.values() if len(group) > 1) for groups in (objects, storages)]


def assert_same_structure(ours, reference):
    """Fail unless both models have the same names, order, shapes, dtypes, devices, ties, modes and module classes."""
    assert list(ours.state_dict()) == list(reference.state_dict())
    got, expected = structure(ours), structure(reference)
    assert list(got) == list(expected)
    different = {name: (got[name], expected[name]) for name in expected if got[name] != expected[name]}
    assert not different, f"name: (got, expected) {different}"
    assert ties(ours) == ties(reference)
    assert classes(ours) == classes(reference)


def classes(module):
    """Return the name, class and mode of each module; parametrized modules each have a class of their own."""
    modules = module.named_modules(remove_duplicate=False)
    return [(name, type(each).__name__, each.training) for name, each in modules]


# Values ---------------------------------------------------------------------------------------------------------------


def bits(tensor):
    """Return the bit patterns of `tensor` on the CPU, so that NaN equals itself and -0.0 differs from 0.0."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(BITS[tensor.element_size()]) if tensor.is_floating_point() else tensor


def same_bits(left, right):
    """Return whether two tensors have one shape, one dtype and one bit pattern each element."""
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(bits(left), bits(right))


def digest(tensors):
    """Return a number for the names, dtypes, shapes and bits of tensors by name."""
    whole = hashlib.sha256()
    for name, tensor in tensors.items():
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(bits(tensor).numpy().tobytes())
    return whole.hexdigest()[:16]


def assert_rounded_once(stored, exact):
    """Fail unless every tensor of the model `stored` is that of the fp32 model `exact`, converted to its dtype."""
    expected = registered(exact)
    wrong = []
    for name, tensor in registered(stored).items():
        if nn.parameter.is_lazy(tensor):
            continue
        once = expected[name].detach().to(tensor.device, tensor.dtype)
        if not same_bits(tensor, once):
            count = (bits(tensor) != bits(once)).sum().item() if tensor.shape == once.shape else "all"
            wrong.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}: {count} elements differ")
    assert not wrong, wrong


def assert_same_bits(left, right):
    """Fail unless two models have bitwise the same tensors under the same names."""
    one, other = registered(left), registered(right)
    assert list(one) == list(other)
    different = [n for n in one if not nn.parameter.is_lazy(one[n]) and not same_bits(one[n], other[n])]
    assert not different, different


def random_names(constructor):
    """Return the names of the tensors that differ between two torch seeds."""
    one, other = registered(plain(constructor, seed=1)), registered(plain(constructor, seed=2))
    return {n for n in one if not nn.parameter.is_lazy(one[n]) and not same_bits(one[n], other[n])}


def assert_same_distribution(ours, theirs, name=""):
    """Fail unless two samples, 1-d in fp32 or fp64, can come from one continuous distribution.

    Each bound is about five standard errors: mean; standard deviation, whose error comes from the sample's fourth
    moment; and the two-sample Kolmogorov-Smirnov distance, whose 1 - 1e-6 quantile is 2.7 sqrt(1/n + 1/m).
    """
    ours, theirs = ours.double().flatten(), theirs.double().flatten()
    n, m = len(ours), len(theirs)
    assert n > 1 and m > 1, name
    mean, variance = theirs.mean(), theirs.var()
    spread = variance.sqrt()
    inverse = 1 / n + 1 / m
    assert abs(ours.mean() - mean) <= 5 * spread * math.sqrt(inverse), f"{name}: mean {ours.mean()} against {mean}"
    kurtosis = (((theirs - mean) / spread) ** 4).mean()
    error = spread * ((kurtosis - 1).clamp(min=0.5) * inverse).sqrt() / 2
    assert abs(ours.std() - spread) <= 5 * error, f"{name}: standard deviation {ours.std()} against {spread}"
    grid = torch.cat([ours, theirs]).sort().values
    steps = [torch.searchsorted(sample.sort().values, grid, right=True) / len(sample) for sample in (ours, theirs)]
    distance = (steps[0] - steps[1]).abs().max()
    assert distance <= 2.7 * math.sqrt(inverse), f"{name}: Kolmogorov-Smirnov distance {distance}"


def samples(build, names, at_least, most=64):
    """Pool the values of `names` over the models `build(0)`, `build(1)`, ... until each has `at_least` values.

    `most` bounds the number of models, for tensors of a few elements.
    """
    pools = {name: [] for name in names}
    for seed in range(most):
        tensors = registered(build(seed))
        for name in names:
            pools[name].append(tensors[name].detach().flatten().float().cpu())
        if all(sum(map(len, pool)) >= at_least for pool in pools.values()):
            break
    return {name: torch.cat(pool) for name, pool in pools.items()}


# State of torch -------------------------------------------------------------------------------------------------------


def state_of_torch():
    """Everything that a context may touch and has to put back."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "init": {name: id(value) for name, value in vars(nn.init).items() if callable(value)},
        "torch": {name: id(value) for name, value in vars(torch).items() if callable(value)},
        "overrides": {name: id(value) for name, value in vars(torch.overrides).items() if callable(value)},
        # A static method is a new wrapper around the same function each time it is assigned.
        "Parameter": {name: id(getattr(value, "__func__", value)) for name, value in vars(nn.Parameter).items()},
        "Tensor": {name: id(value) for name, value in vars(torch.Tensor).items()},
        "Module": {name: id(value) for name, value in vars(nn.Module).items()},
        "parameter hooks": len(nn.modules.module._global_parameter_registration_hooks),
        "buffer hooks": len(nn.modules.module._global_buffer_registration_hooks),
        "modes": torch._C._len_torch_function_stack(),
        "grad": torch.is_grad_enabled(),
        "warnings": list(warnings.filters),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def different(before, after):
    """Return what differs between two states, as before and after."""
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


# The public module classes of torch.nn --------------------------------------------------------------------------------


def _with_forward(constructor, *shapes):
    """Return a constructor that also runs the module on zeros, which is how lazy modules get their parameters."""

    def construct():
        module = constructor()
        module(*(torch.zeros(shape) for shape in shapes))
        return module

    return construct


def _parameter_dict():
    random, zero = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.zeros(3))
    return nn.ParameterDict({"random": random, "zero": zero, "tensor": torch.ones(2)})


def _tied_sequential():
    embedding, head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
    head.weight = embedding.weight
    return nn.Sequential(embedding, nn.LayerNorm(16), head)


def module_classes():
    """Return the public module classes of torch.nn by name."""
    found = {name: getattr(nn, name) for name in dir(nn) if not name.startswith("_")}
    return {name: c for name, c in found.items() if isinstance(c, type) and issubclass(c, nn.Module)}


# One or more constructors for each class. A class that a torch version lacks is skipped; one that is missing here fails
# a test. Sizes are small and odd on purpose: tails of a vector register, several fills in one Philox block.
MODULES = {
    "AdaptiveAvgPool1d": [lambda: nn.AdaptiveAvgPool1d(3)],
    "AdaptiveAvgPool2d": [lambda: nn.AdaptiveAvgPool2d(3)],
    "AdaptiveAvgPool3d": [lambda: nn.AdaptiveAvgPool3d(3)],
    "AdaptiveLogSoftmaxWithLoss": [
        lambda: nn.AdaptiveLogSoftmaxWithLoss(24, 100, [10, 50]),
        lambda: nn.AdaptiveLogSoftmaxWithLoss(24, 100, [10, 50], div_value=2.0, head_bias=True),
    ],
    "AdaptiveMaxPool1d": [lambda: nn.AdaptiveMaxPool1d(3)],
    "AdaptiveMaxPool2d": [lambda: nn.AdaptiveMaxPool2d(3)],
    "AdaptiveMaxPool3d": [lambda: nn.AdaptiveMaxPool3d(3)],
    "AlphaDropout": [lambda: nn.AlphaDropout()],
    "AvgPool1d": [lambda: nn.AvgPool1d(2)],
    "AvgPool2d": [lambda: nn.AvgPool2d(2)],
    "AvgPool3d": [lambda: nn.AvgPool3d(2)],
    "BCELoss": [lambda: nn.BCELoss(), lambda: nn.BCELoss(weight=torch.tensor([0.1, 0.2, 0.7]))],
    "BCEWithLogitsLoss": [
        lambda: nn.BCEWithLogitsLoss(),
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.full((5,), 1 / 3)),
    ],
    "BatchNorm1d": [
        lambda: nn.BatchNorm1d(17),
        lambda: nn.BatchNorm1d(17, affine=False),
        lambda: nn.BatchNorm1d(17, track_running_stats=False),
    ],
    "BatchNorm2d": [lambda: nn.BatchNorm2d(17)],
    "BatchNorm3d": [lambda: nn.BatchNorm3d(17)],
    "Bilinear": [lambda: nn.Bilinear(7, 9, 5), lambda: nn.Bilinear(7, 9, 5, bias=False)],
    "CELU": [lambda: nn.CELU()],
    "CTCLoss": [lambda: nn.CTCLoss()],
    "ChannelShuffle": [lambda: nn.ChannelShuffle(2)],
    "CircularPad1d": [lambda: nn.CircularPad1d(1)],
    "CircularPad2d": [lambda: nn.CircularPad2d(1)],
    "CircularPad3d": [lambda: nn.CircularPad3d(1)],
    "ConstantPad1d": [lambda: nn.ConstantPad1d(1, 0.5)],
    "ConstantPad2d": [lambda: nn.ConstantPad2d(1, 0.5)],
    "ConstantPad3d": [lambda: nn.ConstantPad3d(1, 0.5)],
    "Container": [lambda: nn.Container(first=nn.Linear(5, 3))],
    "Conv1d": [lambda: nn.Conv1d(6, 8, 3), lambda: nn.Conv1d(6, 8, 3, groups=2, bias=False)],
    "Conv2d": [lambda: nn.Conv2d(6, 8, 3), lambda: nn.Conv2d(6, 8, (3, 5), padding_mode="reflect", padding=1)],
    "Conv3d": [lambda: nn.Conv3d(6, 8, 3)],
    "ConvTranspose1d": [lambda: nn.ConvTranspose1d(6, 8, 3)],
    "ConvTranspose2d": [lambda: nn.ConvTranspose2d(6, 8, 3, groups=2)],
    "ConvTranspose3d": [lambda: nn.ConvTranspose3d(6, 8, 3)],
    "CosineEmbeddingLoss": [lambda: nn.CosineEmbeddingLoss()],
    "CosineSimilarity": [lambda: nn.CosineSimilarity()],
    "CrossEntropyLoss": [lambda: nn.CrossEntropyLoss(), lambda: nn.CrossEntropyLoss(weight=torch.rand(7))],
    "CrossMapLRN2d": [lambda: nn.CrossMapLRN2d(3)],
    "DataParallel": [lambda: nn.DataParallel(nn.Linear(9, 7))],
    "Dropout": [lambda: nn.Dropout()],
    "Dropout1d": [lambda: nn.Dropout1d()],
    "Dropout2d": [lambda: nn.Dropout2d()],
    "Dropout3d": [lambda: nn.Dropout3d()],
    "ELU": [lambda: nn.ELU()],
    "Embedding": [
        lambda: nn.Embedding(50, 13),
        lambda: nn.Embedding(50, 13, padding_idx=0),
        lambda: nn.Embedding(50, 13, padding_idx=-1),
        lambda: nn.Embedding.from_pretrained(torch.arange(12.0).view(4, 3)),
        lambda: nn.Embedding.from_pretrained(torch.rand(50, 13), freeze=False, padding_idx=2),
    ],
    "EmbeddingBag": [lambda: nn.EmbeddingBag(50, 13), lambda: nn.EmbeddingBag(50, 13, mode="sum", padding_idx=3)],
    "FeatureAlphaDropout": [lambda: nn.FeatureAlphaDropout()],
    "Flatten": [lambda: nn.Flatten()],
    "Fold": [lambda: nn.Fold(4, 2)],
    "FractionalMaxPool2d": [lambda: nn.FractionalMaxPool2d(2, output_size=3)],
    "FractionalMaxPool3d": [lambda: nn.FractionalMaxPool3d(2, output_size=3)],
    "GELU": [lambda: nn.GELU()],
    "GLU": [lambda: nn.GLU()],
    "GRU": [lambda: nn.GRU(7, 11, num_layers=2, bidirectional=True)],
    "GRUCell": [lambda: nn.GRUCell(7, 11), lambda: nn.GRUCell(7, 11, bias=False)],
    "GaussianNLLLoss": [lambda: nn.GaussianNLLLoss()],
    "GroupNorm": [lambda: nn.GroupNorm(3, 9), lambda: nn.GroupNorm(3, 9, affine=False)],
    "Hardshrink": [lambda: nn.Hardshrink()],
    "Hardsigmoid": [lambda: nn.Hardsigmoid()],
    "Hardswish": [lambda: nn.Hardswish()],
    "Hardtanh": [lambda: nn.Hardtanh()],
    "HingeEmbeddingLoss": [lambda: nn.HingeEmbeddingLoss()],
    "HuberLoss": [lambda: nn.HuberLoss()],
    "Identity": [lambda: nn.Identity(54, unused=0.1)],
    "InstanceNorm1d": [
        lambda: nn.InstanceNorm1d(9),
        lambda: nn.InstanceNorm1d(9, affine=True, track_running_stats=True),
    ],
    "InstanceNorm2d": [lambda: nn.InstanceNorm2d(9, affine=True)],
    "InstanceNorm3d": [lambda: nn.InstanceNorm3d(9, track_running_stats=True)],
    "KLDivLoss": [lambda: nn.KLDivLoss()],
    "L1Loss": [lambda: nn.L1Loss()],
    "LPPool1d": [lambda: nn.LPPool1d(2, 2)],
    "LPPool2d": [lambda: nn.LPPool2d(2, 2)],
    "LPPool3d": [lambda: nn.LPPool3d(2, 2)],
    "LSTM": [
        lambda: nn.LSTM(7, 11),
        lambda: nn.LSTM(7, 11, num_layers=2, bidirectional=True, proj_size=5),
        lambda: nn.LSTM(7, 11, bias=False),
    ],
    "LSTMCell": [lambda: nn.LSTMCell(7, 11)],
    "LayerNorm": [
        lambda: nn.LayerNorm(31),
        lambda: nn.LayerNorm((3, 5), bias=False),
        lambda: nn.LayerNorm(31, elementwise_affine=False),
    ],
    "LazyBatchNorm1d": [lambda: nn.LazyBatchNorm1d(), _with_forward(lambda: nn.LazyBatchNorm1d(), (4, 7))],
    "LazyBatchNorm2d": [lambda: nn.LazyBatchNorm2d(), _with_forward(lambda: nn.LazyBatchNorm2d(), (2, 7, 3, 3))],
    "LazyBatchNorm3d": [lambda: nn.LazyBatchNorm3d()],
    "LazyConv1d": [lambda: nn.LazyConv1d(8, 3), _with_forward(lambda: nn.LazyConv1d(8, 3), (1, 5, 9))],
    "LazyConv2d": [lambda: nn.LazyConv2d(8, 3), _with_forward(lambda: nn.LazyConv2d(8, 3), (1, 5, 6, 6))],
    "LazyConv3d": [lambda: nn.LazyConv3d(8, 3)],
    "LazyConvTranspose1d": [
        lambda: nn.LazyConvTranspose1d(8, 3),
        _with_forward(lambda: nn.LazyConvTranspose1d(8, 3), (1, 5, 9)),
    ],
    "LazyConvTranspose2d": [lambda: nn.LazyConvTranspose2d(8, 3)],
    "LazyConvTranspose3d": [lambda: nn.LazyConvTranspose3d(8, 3)],
    "LazyInstanceNorm1d": [
        lambda: nn.LazyInstanceNorm1d(affine=True, track_running_stats=True),
        _with_forward(lambda: nn.LazyInstanceNorm1d(affine=True, track_running_stats=True), (2, 7, 5)),
    ],
    "LazyInstanceNorm2d": [lambda: nn.LazyInstanceNorm2d(affine=True)],
    "LazyInstanceNorm3d": [lambda: nn.LazyInstanceNorm3d(affine=True)],
    "LazyLinear": [lambda: nn.LazyLinear(23), _with_forward(lambda: nn.LazyLinear(23), (2, 19))],
    "LeakyReLU": [lambda: nn.LeakyReLU()],
    "Linear": [lambda: nn.Linear(48, 33), lambda: nn.Linear(48, 33, bias=False), lambda: nn.Linear(1, 1)],
    "LinearCrossEntropyLoss": [lambda: nn.LinearCrossEntropyLoss(24, 10, bias=True)],
    "LocalResponseNorm": [lambda: nn.LocalResponseNorm(2)],
    "LogSigmoid": [lambda: nn.LogSigmoid()],
    "LogSoftmax": [lambda: nn.LogSoftmax(-1)],
    "MSELoss": [lambda: nn.MSELoss()],
    "MarginRankingLoss": [lambda: nn.MarginRankingLoss()],
    "MaxPool1d": [lambda: nn.MaxPool1d(2)],
    "MaxPool2d": [lambda: nn.MaxPool2d(2)],
    "MaxPool3d": [lambda: nn.MaxPool3d(2)],
    "MaxUnpool1d": [lambda: nn.MaxUnpool1d(2)],
    "MaxUnpool2d": [lambda: nn.MaxUnpool2d(2)],
    "MaxUnpool3d": [lambda: nn.MaxUnpool3d(2)],
    "Mish": [lambda: nn.Mish()],
    "Module": [lambda: nn.Module()],
    "ModuleDict": [lambda: nn.ModuleDict({"one": nn.Linear(9, 7), "two": nn.LayerNorm(7)})],
    "ModuleList": [lambda: nn.ModuleList(nn.Linear(9, 7) for _ in range(3))],
    "MultiLabelMarginLoss": [lambda: nn.MultiLabelMarginLoss()],
    "MultiLabelSoftMarginLoss": [lambda: nn.MultiLabelSoftMarginLoss(weight=torch.tensor([0.3, 0.7]))],
    "MultiMarginLoss": [lambda: nn.MultiMarginLoss()],
    "MultiheadAttention": [
        lambda: nn.MultiheadAttention(24, 3),
        lambda: nn.MultiheadAttention(24, 3, add_bias_kv=True, kdim=7, vdim=5),
        lambda: nn.MultiheadAttention(24, 3, bias=False),
    ],
    "NLLLoss": [lambda: nn.NLLLoss(), lambda: nn.NLLLoss(weight=torch.linspace(0, 1, 7))],
    "NLLLoss2d": [lambda: nn.NLLLoss2d()],
    "PReLU": [lambda: nn.PReLU(), lambda: nn.PReLU(7, init=0.1)],
    "PairwiseDistance": [lambda: nn.PairwiseDistance()],
    "ParameterDict": [_parameter_dict],
    "ParameterList": [
        lambda: nn.ParameterList([nn.Parameter(torch.randn(5, 3)), torch.rand(4), torch.empty(2).fill_(0.3)])
    ],
    "PixelShuffle": [lambda: nn.PixelShuffle(2)],
    "PixelUnshuffle": [lambda: nn.PixelUnshuffle(2)],
    "PoissonNLLLoss": [lambda: nn.PoissonNLLLoss()],
    "RMSNorm": [lambda: nn.RMSNorm(31), lambda: nn.RMSNorm(31, elementwise_affine=False)],
    "RNN": [lambda: nn.RNN(7, 11, num_layers=2, nonlinearity="relu")],
    "RNNBase": [lambda: nn.RNNBase("GRU", 7, 11)],
    "RNNCell": [lambda: nn.RNNCell(7, 11)],
    "RNNCellBase": [lambda: nn.RNNCellBase(7, 11, bias=True, num_chunks=2)],
    "RReLU": [lambda: nn.RReLU()],
    "ReLU": [lambda: nn.ReLU()],
    "ReLU6": [lambda: nn.ReLU6()],
    "ReflectionPad1d": [lambda: nn.ReflectionPad1d(1)],
    "ReflectionPad2d": [lambda: nn.ReflectionPad2d(1)],
    "ReflectionPad3d": [lambda: nn.ReflectionPad3d(1)],
    "ReplicationPad1d": [lambda: nn.ReplicationPad1d(1)],
    "ReplicationPad2d": [lambda: nn.ReplicationPad2d(1)],
    "ReplicationPad3d": [lambda: nn.ReplicationPad3d(1)],
    "SELU": [lambda: nn.SELU()],
    "Sequential": [lambda: nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5)), _tied_sequential],
    "SiLU": [lambda: nn.SiLU()],
    "Sigmoid": [lambda: nn.Sigmoid()],
    "SmoothL1Loss": [lambda: nn.SmoothL1Loss()],
    "SoftMarginLoss": [lambda: nn.SoftMarginLoss()],
    "Softmax": [lambda: nn.Softmax(-1)],
    "Softmax2d": [lambda: nn.Softmax2d()],
    "Softmin": [lambda: nn.Softmin(-1)],
    "Softplus": [lambda: nn.Softplus()],
    "Softshrink": [lambda: nn.Softshrink()],
    "Softsign": [lambda: nn.Softsign()],
    "SyncBatchNorm": [
        lambda: nn.SyncBatchNorm(17),
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))),
    ],
    "Tanh": [lambda: nn.Tanh()],
    "Tanhshrink": [lambda: nn.Tanhshrink()],
    "Threshold": [lambda: nn.Threshold(0.1, 20)],
    "Transformer": [lambda: nn.Transformer(16, 2, 1, 2, dim_feedforward=24)],
    "TransformerDecoder": [lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24), 2)],
    "TransformerDecoderLayer": [lambda: nn.TransformerDecoderLayer(16, 2, 24, norm_first=True)],
    "TransformerEncoder": [
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, nn.LayerNorm(16))
    ],
    "TransformerEncoderLayer": [lambda: nn.TransformerEncoderLayer(16, 2, 24, bias=False)],
    "TripletMarginLoss": [lambda: nn.TripletMarginLoss()],
    "TripletMarginWithDistanceLoss": [lambda: nn.TripletMarginWithDistanceLoss()],
    "Unflatten": [lambda: nn.Unflatten(1, (2, 3))],
    "Unfold": [lambda: nn.Unfold(2)],
    "Upsample": [lambda: nn.Upsample(scale_factor=2)],
    "UpsamplingBilinear2d": [lambda: nn.UpsamplingBilinear2d(scale_factor=2)],
    "UpsamplingNearest2d": [lambda: nn.UpsamplingNearest2d(scale_factor=2)],
    "ZeroPad1d": [lambda: nn.ZeroPad1d(1)],
    "ZeroPad2d": [lambda: nn.ZeroPad2d(1)],
    "ZeroPad3d": [lambda: nn.ZeroPad3d(1)],
}


def module_cases():
    """Return `(id, constructor)` for each constructor of a class that this torch has."""
    classes = module_classes()
    cases = []
    for name, constructors in MODULES.items():
        if name in classes:
            for k, constructor in enumerate(constructors):
                cases.append((f"{name}-{k}" if len(constructors) > 1 else name, _quiet(constructor)))
    return cases


def _quiet(constructor):
    """Return `constructor` without torch's own warnings: deprecated classes, lazy modules, nested tensors."""

    def construct():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="Lazy modules are a new feature|enable_nested_tensor is True")
            return constructor()

    return construct
