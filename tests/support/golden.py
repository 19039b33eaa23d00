"""Some forty whole models, and digests of all their tensors: what a release writes today it has to write tomorrow.

    python tests/support/golden.py            # says which tensors are not as in tests/support/golden.json
    python tests/support/golden.py --write    # writes tests/support/golden.json

The known answers (known_answers.json) fix what a single fill writes. These fix what a model gets: also which call of
its constructor takes which stream, which arithmetic is part of a fill, and what the modes `empty=True` and `shard=True`
make of it. A model that is trained from a seed, or a checkpoint that lacks a tensor, relies on all of that.

Every model is made in fp32 and bf16, in each of MODES. The file has a digest for each of these, and for each tensor a
shorter one, so that a failure can say which tensors changed. Modes promise equal bits: tensors are listed once for all.

Random numbers of the native stream and IEEE operations such as products are the same on any machine. What torch
computes by a library is not: sines and logarithms, sums, factorizations may have other last bits with another
instruction set, another maker's processor or another torch. Such tensors are named as computed where the model is
defined, and are compared only on a machine like the one that wrote the file.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import json
import math
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from models import bits, registered
from torch import Tensor, nn
from torch.nn import init
from torch.nn.utils import parametrizations, skip_init

import fastinit
from fastinit.cli.models import Decoder, DecoderConfig

try:
    import transformers
except ImportError:
    transformers = None

FILE = Path(__file__).with_name("golden.json")
SEED = 1234
DTYPES = ("fp32", "bf16")


class Model(NamedTuple):
    make: Callable[[], nn.Module]
    computed: tuple[str, ...]  # patterns of the names of tensors that torch computes by more than IEEE operations
    of_transformers: bool


MODELS: dict[str, Model] = {}


def model(*computed: str, of_transformers: bool = False) -> Callable[[Callable[[], nn.Module]], Any]:
    """Add a function or a class to MODELS, under its name."""

    def add(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        MODELS[make.__name__.lstrip("_")] = Model(make, computed, of_transformers)
        return make

    return add


# Making them and their digests ----------------------------------------------------------------------------------------


def _at_once(make: Callable[[], nn.Module], dtype: str) -> nn.Module:
    with fastinit.on("cpu", dtype, seed=SEED):
        return make()


def _empty(make: Callable[[], nn.Module], dtype: str) -> nn.Module:
    with fastinit.on("cpu", dtype, seed=SEED, empty=True):
        module = make()
    fastinit.initialize(module)
    return module


def _sharded(make: Callable[[], nn.Module], dtype: str) -> nn.Module:
    with fastinit.on("cpu", dtype, seed=SEED, shard=True):
        module = make()
    fastinit.materialize(module)
    return module


MODES = {"device": _at_once, "empty": _empty, "shard": _sharded}


def digests(module: nn.Module) -> dict[str, str]:
    """A digest of each tensor under each of its names: of name, dtype, shape, strides and bytes."""
    found = {}
    for name, tensor in sorted(registered(module).items()):
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} "
        found[name] = hashlib.sha256(head.encode() + bits(tensor).numpy().tobytes()).hexdigest()
    return found


def digest(of_tensors: dict[str, str]) -> str:
    """The digest of a model, of those of its tensors."""
    return hashlib.sha256("".join(of_tensors.values()).encode()).hexdigest()[:16]


def short(of_tensors: dict[str, str]) -> dict[str, str]:
    return {name: each[:8] for name, each in of_tensors.items()}


def matching(tensors: Iterable[str], patterns: Iterable[str]) -> set[str]:
    return {tensor for tensor in tensors for pattern in patterns if fnmatch.fnmatchcase(tensor, pattern)}


def machine() -> dict[str, str]:
    """What computed tensors depend on."""
    maker = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        maker = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), maker)
    except OSError:
        pass  # not Linux
    return {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "maker": maker}


def transformers_version() -> str | None:
    return transformers.__version__ if transformers else None


# The file -------------------------------------------------------------------------------------------------------------


@functools.cache
def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def recorded(name: str, dtype: str) -> dict[str, str]:
    """The short digest of each tensor of a model, from the file."""
    column = DTYPES.index(dtype)
    rows = {tensor: row.split() for tensor, row in golden()["models"][name]["tensors"].items()}
    return {tensor: row[column] for tensor, row in rows.items() if row[column] != "-"}


def differences(name: str, dtype: str, mode: str, like_the_files: bool) -> Iterator[str]:
    """What is not as in the file, a line each; of computed tensors only if the machine is `like_the_files`."""
    expected, listed = golden()["models"][name][dtype][mode], recorded(name, dtype)
    if expected is None:
        if not isinstance(_made_twice(name, dtype, mode), str):
            yield "it can be made, and always as the same, which it could not when the file was written"
        return
    try:
        made = digests(MODES[mode](MODELS[name].make, dtype))
    except Exception as error:
        yield f"it cannot be made: {type(error).__name__}: {error}"
        return
    now = short(made)
    computed = matching(now, MODELS[name].computed)
    for tensor in sorted({*now, *listed}):
        kind = "computed by torch" if tensor in computed else "native"
        if tensor not in now:
            yield f"{tensor} is gone"
        elif tensor not in listed:
            yield f"{tensor} is new"
        elif now[tensor] != listed[tensor] and (like_the_files or kind == "native"):
            yield f"{tensor} has another dtype, shape, stride or value ({kind})"
    if like_the_files and now == listed and digest(made) != expected:
        yield f"the model's digest is {digest(made)} and was {expected}, although the short digests are equal"


def _made_twice(name: str, dtype: str, mode: str) -> dict[str, str] | str:
    """The digests of a model's tensors, or why it has none."""
    try:
        one, other = (digests(MODES[mode](MODELS[name].make, dtype)) for _ in range(2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    changing = [tensor for tensor in one if one[tensor] != other[tensor]]
    return f"these tensors do not depend on the seed alone: {', '.join(changing)}" if changing else one


def _entry(name: str) -> dict[str, Any]:
    """The file's line on a model. A mode that cannot make it, or not twice the same, is None."""
    entry: dict[str, Any] = {}
    columns = []
    for dtype in DTYPES:
        entry[dtype] = {}
        tables: list[dict[str, str]] = []
        for mode in MODES:
            made = _made_twice(name, dtype, mode)
            entry[dtype][mode] = None if isinstance(made, str) else digest(made)
            if isinstance(made, str):
                print(f"{name} in {dtype}, mode {mode}, is null: {made}", file=sys.stderr)
            else:
                tables.append(short(made))
        if any(table != tables[0] for table in tables):
            raise SystemExit(f"golden.py: the modes make model {name!r} in {dtype} differently: a fault of fastinit")
        columns.append(tables[0] if tables else {})
    names = sorted({tensor for column in columns for tensor in column})
    entry["tensors"] = {tensor: " ".join(column.get(tensor, "-") for column in columns) for tensor in names}
    return entry


def _write() -> None:
    if transformers is None:
        raise SystemExit("golden.py: --write needs transformers, whose models are a part of the file: install it")
    head = {
        "about": "Digests of whole models, written by tests/support/golden.py, which explains them. A tensor has one "
        f"in {' and one in '.join(DTYPES)}; null: a mode that cannot make the model, or not twice the same.",
        "machine": machine(),
        "transformers": transformers_version(),
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    models = [f"  {json.dumps(name)}: {json.dumps(_entry(name), separators=(',', ':'))}" for name in MODELS]
    FILE.write_text("\n".join(["{", *lines, ' "models": {', ",\n".join(models), " }", "}"]) + "\n")


def _compare() -> None:
    """Print what differs, and end with 1 if anything does."""
    like = machine() == golden()["machine"]
    if not like:
        print(f"computed tensors are left out: the file is of {golden()['machine']}, this is {machine()}")
    found = 0
    for name, each in MODELS.items():
        if each.of_transformers and transformers_version() != golden()["transformers"]:
            print(f"{name} is left out: the file is of transformers {golden()['transformers']}")
            continue
        for dtype in DTYPES:
            for mode in MODES:
                for line in differences(name, dtype, mode, like):
                    print(f"{name} in {dtype}, mode {mode}: {line}")
                    found += 1
    print(f"{found} differences")
    sys.exit(found > 0)


# Modules of torch.nn --------------------------------------------------------------------------------------------------
#
# A definition here is frozen like the digests: a new thing to be covered is a new model.


@model()
def linear() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 65, bias=False), nn.LayerNorm(65), nn.RMSNorm(65), nn.Linear(65, 1)
    )


@model()
def convolutions() -> nn.Module:
    last = nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(
        nn.Conv1d(6, 8, 3),
        nn.Conv2d(8, 8, (3, 5), groups=2, bias=False),
        nn.Conv3d(3, 5, 3),
        nn.ConvTranspose1d(6, 8, 3),
        nn.ConvTranspose2d(6, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.PReLU(8, init=0.1),
        last,
    )


@model()
def recurrent() -> nn.Module:
    return nn.ModuleList(
        [
            nn.LSTM(7, 11, num_layers=2, bidirectional=True, proj_size=5),
            nn.GRU(7, 11, num_layers=2, bidirectional=True),
            nn.RNN(7, 11, bias=False),
            nn.LSTMCell(5, 9),
            nn.GRUCell(5, 9),
        ]
    )


@model()
def attention() -> nn.Module:
    return nn.ModuleList(
        [
            nn.MultiheadAttention(24, 3),
            nn.MultiheadAttention(24, 3, add_bias_kv=True, kdim=7, vdim=5),
            nn.MultiheadAttention(24, 3, bias=False),
        ]
    )


@model()
def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 3, nn.LayerNorm(16))


@model()
def transformer() -> nn.Module:
    return nn.Transformer(16, 2, 1, 2, dim_feedforward=24, batch_first=True)


@model()
def embeddings() -> nn.Module:
    return nn.ModuleList(
        [
            nn.Embedding(50, 13),
            nn.Embedding(50, 13, padding_idx=3),
            nn.Embedding(9, 4, padding_idx=-1, max_norm=1.0),
            nn.EmbeddingBag(50, 13, mode="sum", padding_idx=0),
            nn.Embedding.from_pretrained(torch.arange(12.0).view(4, 3)),
            nn.Embedding.from_pretrained(torch.rand(20, 5), freeze=False, padding_idx=2),
        ]
    )


@model()
def bilinear_and_softmax() -> nn.Module:
    softmax = nn.AdaptiveLogSoftmaxWithLoss(24, 100, [10, 50], div_value=2.0, head_bias=True)
    return nn.ModuleList([nn.Bilinear(7, 9, 5), nn.Bilinear(3, 2, 70, bias=False), softmax])


@model("*.original0")  # norms
def weight_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(9, 7)), parametrizations.weight_norm(nn.Conv1d(6, 8, 3), dim=2)
    )


@model("*._u", "*._v")  # after some iterations
def spectral_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(9, 7)), parametrizations.spectral_norm(nn.Conv2d(4, 6, 3))
    )


@model("0.weight", "1.weight", "2.weight_hh_l0", "3.parametrizations.weight.*")  # QR
def orthogonal() -> nn.Module:
    wide, deep, recurrent = nn.Linear(31, 9), nn.Conv2d(4, 6, 3), nn.GRU(5, 8)
    init.orthogonal_(wide.weight)
    init.orthogonal_(deep.weight, gain=init.calculate_gain("relu"))
    init.orthogonal_(recurrent.weight_hh_l0)
    init.zeros_(wide.bias)
    return nn.ModuleList([wide, deep, recurrent, parametrizations.orthogonal(nn.Linear(6, 6))])


@model()
class EveryInit(nn.Module):
    """The functions of torch.nn.init but those that compute."""

    def __init__(self) -> None:
        super().__init__()
        fills: dict[str, Callable[[Tensor], Any]] = {
            "uniform": lambda t: init.uniform_(t, -0.3, 0.7),
            "normal": lambda t: init.normal_(t, 0.5, 0.02),
            "constant": lambda t: init.constant_(t, 1 / 3),
            "ones": init.ones_,
            "zeros": init.zeros_,
            "eye": init.eye_,
            "xavier_uniform": lambda t: init.xavier_uniform_(t, gain=init.calculate_gain("tanh")),
            "xavier_normal": init.xavier_normal_,
            "kaiming_uniform": lambda t: init.kaiming_uniform_(t, a=math.sqrt(5)),
            "kaiming_normal": lambda t: init.kaiming_normal_(t, mode="fan_out", nonlinearity="relu"),
            "kaiming_leaky": lambda t: init.kaiming_normal_(t, a=0.2, nonlinearity="leaky_relu"),
            "trunc_normal": lambda t: init.trunc_normal_(t, std=0.02),
            "trunc_normal_narrow": lambda t: init.trunc_normal_(t, mean=0.1, std=1.0, a=-0.5, b=0.25),
            "trunc_normal_beside": lambda t: init.trunc_normal_(t, std=1.0, a=1.0, b=3.0),
            "sparse": lambda t: init.sparse_(t, sparsity=0.25, std=0.1),
        }
        for name, fill in fills.items():
            self.register_parameter(name, nn.Parameter(torch.empty(19, 23)))
            fill(getattr(self, name))
        self.dirac = nn.Parameter(init.dirac_(torch.empty(6, 4, 3), groups=2))


@model()
def lazy_and_skipped() -> nn.Module:
    lazy = nn.Sequential(nn.LazyLinear(23), nn.LazyBatchNorm1d())
    lazy(torch.zeros(2, 19))
    skipped = skip_init(nn.Linear, 9, 7)
    init.normal_(skipped.weight, std=0.1)
    init.zeros_(skipped.bias)
    again = nn.Linear(9, 7)
    again.reset_parameters()
    return nn.ModuleList([lazy, skipped, again, nn.Linear(9, 7)])


@model("*.frequencies")
def decoder() -> nn.Module:
    return Decoder(DecoderConfig(vocabulary=97, width=48, layers=2, heads=4, hidden=72, key_value_heads=2))


# Inits as people write them -------------------------------------------------------------------------------------------


@model()
class VisionTransformer(nn.Module):
    """As timm has it: truncated normals, LayerScale, a class token."""

    def __init__(self, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.norm, block.attend, block.up = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, 56)
            block.scale = nn.Parameter(1e-5 * torch.ones(width))
            self.blocks.append(block)
        self.head = nn.Linear(width, 10)
        init.trunc_normal_(self.positions, std=0.02)
        init.normal_(self.token, std=1e-6)
        self.apply(self._init)
        with torch.no_grad():
            self.head.weight.mul_(0.001)
            self.head.bias.fill_(-math.log(10))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            init.trunc_normal_(module.weight, std=math.sqrt(1 / fan_in))


@model()
class TruncatedByHand(nn.Module):
    """The chain that libraries write out for a truncated normal, on a parameter, on data, and on a part of one."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.empty(17, 19))
        self.data = nn.Parameter(torch.empty(17, 19))
        with torch.no_grad():
            self._fill(self.whole, 0.0, 0.02, -2.0, 2.0)
        self._fill(self.data.data, 0.5, 1.0, -0.5, 0.75)

    @staticmethod
    def _fill(tensor: Tensor, mean: float, std: float, low: float, high: float) -> None:
        below, above = ((1 + math.erf((x - mean) / std / math.sqrt(2))) / 2 for x in (low, high))
        tensor.uniform_(2 * below - 1, 2 * above - 1)
        tensor.erfinv_()
        tensor.mul_(std * math.sqrt(2))
        tensor.add_(mean)
        tensor.clamp_(min=low, max=high)


@model("inverse", "cos", "sin", "named", "angles", "sinusoids", "timesteps")
class PositionTables(nn.Module):
    """Rotary tables, sinusoids, and the frequencies of a diffusion model."""

    def __init__(self, width: int = 16, length: int = 24) -> None:
        super().__init__()
        inverse = 1.0 / torch.pow(10000.0, torch.arange(0, width, 2).float() / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
        self.register_buffer("inverse", inverse, persistent=False)
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos())
        self.register_buffer("sin", torch.cat((angles, angles), dim=-1).sin(), persistent=False)
        self.register_buffer("named", angles.cos().to(torch.float16))
        self.register_buffer("angles", torch.polar(torch.ones_like(angles), angles), persistent=False)
        table = torch.zeros(length, width)
        position = torch.arange(0, length).unsqueeze(1)
        term = torch.exp(torch.arange(0, width, 2) * -(math.log(10000.0) / width))
        table[:, 0::2] = torch.sin(position * term)
        table[:, 1::2] = torch.cos(position * term)
        self.register_buffer("sinusoids", table.unsqueeze(0))
        self.timesteps = nn.Parameter(
            torch.exp(-math.log(10000) * torch.arange(0, 8, dtype=torch.float32) / 8), requires_grad=False
        )
        self.projection = nn.Linear(width, width)


@model("A_log", "dt_proj.bias")
class StateSpace(nn.Module):
    """Mamba's own: A_log, and the bias that is the inverse of a softplus."""

    def __init__(self, width: int = 24, states: int = 8, rank: int = 3) -> None:
        super().__init__()
        self.in_proj = nn.Linear(16, 2 * width, bias=False)
        self.conv = nn.Conv1d(width, width, 4, groups=width, padding=3)
        self.dt_proj = nn.Linear(rank, width)
        init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        dt = torch.exp(torch.rand(width) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(torch.arange(1, states + 1, dtype=torch.float32).repeat(width, 1)))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, 16, bias=False)
        init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(2 * 12)


@model("slopes", "bias", "powers")
class Alibi(nn.Module):
    """Slopes of heads, and masks of every kind."""

    def __init__(self, heads: int = 6, length: int = 10) -> None:
        super().__init__()
        slopes = torch.tensor([2 ** (-8 * (head + 1) / heads) for head in range(heads)])
        self.register_buffer("slopes", slopes)
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        self.register_buffer("bias", slopes[:, None, None] * distance, persistent=False)
        self.register_buffer("powers", torch.pow(0.84, torch.arange(1, 1 + heads, dtype=torch.int32)))
        dtype = torch.get_default_dtype()
        causal = torch.full((length, length), torch.finfo(dtype).min)
        self.register_buffer("causal", torch.triu(causal, diagonal=1), persistent=False)
        self.register_buffer("infinite", torch.full((length, length), float("-inf")).triu_(1))
        self.register_buffer("allowed", torch.tril(torch.ones(length, length, dtype=torch.bool)).view(1, 1, 10, 10))
        self.register_buffer("filled", torch.zeros(4, 4).masked_fill(torch.eye(4).bool(), -1e9))
        self.query = nn.Linear(12, heads * 4)


@model()
class TiedLanguageModel(nn.Module):
    """As nanoGPT has it: tied after both were initialized, and projections scaled by depth."""

    def __init__(self, width: int = 24, layers: int = 2, vocabulary: int = 61) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attend": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.tokens.weight = self.head.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                init.normal_(module.weight, mean=0.0, std=0.02)
                if getattr(module, "bias", None) is not None:
                    init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * layers))


@model()
class WrittenInParts(nn.Module):
    """Gates, rows, columns and experts of one tensor, each written for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.LSTM(6, 8)
        with torch.no_grad():
            for name, parameter in self.gates.named_parameters():
                if "bias" in name:
                    parameter.zero_()
                    parameter[8:16].fill_(1.0)
        self.fused = nn.Linear(12, 36)
        for part in self.fused.weight.data.chunk(3):
            init.xavier_uniform_(part)
        self.fused.bias.data[12:24] = 0
        self.experts = nn.Parameter(torch.empty(4, 9, 7))
        for expert in range(4):
            init.kaiming_uniform_(self.experts[expert], a=math.sqrt(5))
        self.table = nn.Parameter(torch.randn(11, 6))
        with torch.no_grad():
            self.table[2] = 0.0
            self.table[:, -1].fill_(0.5)
            self.table[5:7, 1:3].normal_(1.0, 0.1)
            self.table[[1, 4]] = torch.ones(2, 6)


@model("relative", "linspace")
class ConstantBuffers(nn.Module):
    """What constructors write down, and what they work out in integers."""

    def __init__(self, window: int = 4) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("kernel", torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("temperature", torch.tensor(0.07))
        self.register_buffer("linspace", torch.linspace(-1, 1, 33))
        self.register_buffer("ids", torch.arange(32).expand((1, -1)), persistent=False)
        self.register_buffer("from_numpy", torch.from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3) / 4))
        self.register_buffer("identity", torch.eye(5))
        self.register_buffer("fp16", torch.full((3,), 0.1, dtype=torch.float16))
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += window - 1
        relative[:, :, 1] += window - 1
        relative[:, :, 0] *= 2 * window - 1
        self.register_buffer("index", relative.sum(-1))
        signed = torch.arange(1 - window, window).float() / (window - 1) * 8
        self.register_buffer("relative", torch.sign(signed) * torch.log2(torch.abs(signed) + 1.0) / math.log2(8))
        self.scale = nn.Parameter(torch.tensor([1.0]) * 2.6592)


@model()
class NumpyArguments(nn.Module):
    """Bounds and deviations that are numbers of NumPy, given to torch.nn.init."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 9)
        init.uniform_(self.table.weight, a=-np.sqrt(1 / 40), b=np.sqrt(1 / 40))
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in [(9, 17), (17, 5)])
        for layer in self.layers:
            init.normal_(layer.weight, np.float64(0.0), np.sqrt(2 / sum(layer.weight.shape)))
            init.normal_(layer.bias.data, 0.0, np.float32(0.25))
        self.clipped = nn.Linear(6, 24)
        init.trunc_normal_(self.clipped.weight, std=np.sqrt(1 / 6), a=np.float64(-0.5), b=np.float64(0.5))
        init.zeros_(self.clipped.bias)
        self.logit_scale = nn.Parameter(torch.ones([]) * np.float64(2.625))


@model()
class NumpyArgumentsOfMethods(nn.Module):
    """The same, given to the tensor's own methods. fastinit 0.1.0 left these calls to torch and its generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.sines = nn.Linear(9, 17), nn.Linear(6, 24)
        self.layer.weight.data.normal_(np.float64(0.0), np.sqrt(2 / (9 + 17)))
        self.layer.bias.data.normal_(std=np.sqrt(np.float32(1) / np.float32(9)))
        with torch.no_grad():
            self.sines.weight.uniform_(-np.sqrt(6 / 6) / 30, np.sqrt(6 / 6) / 30)


@model("features")
class RandomExpressions(nn.Module):
    """Random tensors that are made by an expression, and the random functions that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = nn.Parameter(torch.randn(13, 7) * 0.02)
        self.shifted = nn.Parameter(2 * torch.rand(13, 7) - 1)
        self.divided = nn.Parameter(torch.randn(5, 1, 7) / math.sqrt(7))
        self.sized = nn.Parameter(torch.normal(1.0, 0.25, (31,)))
        self.alike = nn.Parameter(torch.randn_like(self.scaled))
        self.chosen = nn.Parameter(torch.empty(9).uniform_(0.9, 0.999).clamp_(0.92, 0.99))
        self.register_buffer("noise", torch.rand(8))
        self.register_buffer("integers", torch.randint(0, 100, (12,)))
        self.register_buffer("order", torch.randperm(17), persistent=False)
        self.register_buffer("features", torch.cos(torch.randn(6, 4) * 2 * math.pi))


@model("normal", "uniform")  # torch's own draws, in bf16 others in torch 2.9 and older
class OwnGenerator(nn.Module):
    """The constructor's own generator is torch's, and its calls take no stream from what follows."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.before = nn.Linear(5, 7)
        self.uniform = nn.Parameter(torch.empty(33).uniform_(-1, 1, generator=generator))
        self.normal = nn.Parameter(torch.randn(33, generator=generator))
        self.after = nn.Linear(5, 7)


@model()
class ManyDtypes(nn.Module):
    """Dtypes that the code names, and conversions of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.fp32 = nn.Linear(9, 7, dtype=torch.float32)
        self.fp16 = nn.Linear(9, 7).half()
        self.fp64 = nn.Parameter(torch.rand(11, dtype=torch.float64))
        self.named = nn.Parameter(torch.randn(11, 3, dtype=torch.bfloat16))
        self.converted = nn.Parameter(torch.randn(11, 3).to(torch.float16))
        self.register_buffer("bytes", torch.zeros(6, dtype=torch.uint8))
        self.register_buffer("quantised", torch.full((3, 4), -7, dtype=torch.int8))
        self.register_buffer("flags", torch.ones(5, dtype=torch.bool))
        self.router = nn.Linear(9, 4).to(torch.float32)
        self.plain = nn.Linear(9, 7)


@model()
class Strides(nn.Module):
    """Tensors that are transposed, cut, expanded or laid out otherwise before they become parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(6, 10).t())
        self.cut = nn.Parameter(torch.randn(8, 12)[2:6, 1:5].clone())
        self.expanded = nn.Parameter(torch.rand(1, 7).expand(5, 7).contiguous())
        self.permuted = nn.Parameter(torch.empty(3, 4, 5).permute(2, 0, 1).contiguous().normal_(std=0.5))
        self.channels_last = nn.Parameter(torch.empty(4, 3, 5, 5, memory_format=torch.channels_last).normal_())
        self.stacked = nn.Parameter(torch.stack([torch.randn(4, 3) for _ in range(3)]))
        self.joined = nn.Parameter(torch.cat([torch.zeros(1, 6), torch.randn(5, 6)]))


@model()
class Residual(nn.Module):
    """A small ResNet as torchvision has it: by fan-out, and the last norm of each block zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
            for _ in range(2)
        )
        self.fc = nn.Linear(8, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                init.constant_(module.weight, 1)
                init.constant_(module.bias, 0)
        for block in self.blocks:
            init.constant_(block[-1].weight, 0)


# Models of transformers -----------------------------------------------------------------------------------------------

_SMALL = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SMALL, "vocab_size": 99}


@model("*inv_freq", of_transformers=True)
def llama() -> nn.Module:
    config = transformers.LlamaConfig(**_TEXT, num_key_value_heads=2, pad_token_id=3)
    return transformers.LlamaForCausalLM(config)


@model(of_transformers=True)
def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=40, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


@model(of_transformers=True)
def bert() -> nn.Module:
    return transformers.BertForPreTraining(transformers.BertConfig(**_TEXT, max_position_embeddings=40))


@model(of_transformers=True)
def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


@model(of_transformers=True)
def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**_SMALL, image_size=16, patch_size=4))


@model("*A_log", "*dt_proj.bias", of_transformers=True)
def mamba() -> nn.Module:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=8)
    return transformers.MambaForCausalLM(config)


@model("*.parametrizations.weight.original0", of_transformers=True)
def wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **{**_TEXT, "vocab_size": 20},
        conv_dim=(16, 16),
        conv_kernel=(4, 3),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    return transformers.Wav2Vec2ForCTC(config)


@model("*inv_freq", of_transformers=True)
def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**_TEXT, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


@model(of_transformers=True)
def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 4], window_size=4
    )
    return transformers.SwinForImageClassification(config)


@model("*embed_positions.weight", of_transformers=True)
def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=56,
        decoder_ffn_dim=56,
        vocab_size=99,
        num_mel_bins=10,
        max_source_positions=12,
        max_target_positions=16,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=2,
    )
    return transformers.WhisperForConditionalGeneration(config)


@model(of_transformers=True)
def clip() -> nn.Module:
    config = transformers.CLIPConfig(
        text_config={**_TEXT, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 24},
        vision_config={**_SMALL, "image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
    return transformers.CLIPModel(config)


@model(of_transformers=True)
def bloom() -> nn.Module:
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config)


@model(of_transformers=True)
def convnext() -> nn.Module:
    config = transformers.ConvNextV2Config(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32)
    return transformers.ConvNextV2ForImageClassification(config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compares whole models with tests/support/golden.json.")
    parser.add_argument("--write", action="store_true", help="write the file instead")
    _write() if parser.parse_args().write else _compare()
