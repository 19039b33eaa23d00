"""Lightning's Trainer and Fabric with fastinit enabled: their own promises hold, and the values are fastinit's.

Lightning's installed package runs as it is. It refuses FSDP, ModelParallelStrategy and DeepSpeed on CPUs, so these are
tested one level below Trainer and Fabric: their strategies, on two processes with gloo, create and set up models by the
methods that Trainer and Fabric call, in the order in which they do.
"""

import doctest
import subprocess
import sys
import types
import warnings
from contextlib import contextmanager

import pytest
import torch
from models import same_bits
from ranks import Ranks, launched, launched_by_deepspeed
from torch import nn
from torch.nn import init

import fastinit
import fastinit.lightning

pytest.importorskip("lightning")

import lightning
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.precision import utils as precision_utils
from lightning.fabric.strategies import SingleDeviceStrategy as FabricSingleDevice
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

SEED = 5
DTYPES = {
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "32-true": torch.float32,
    "16-mixed": torch.float32,
    "bf16-mixed": torch.float32,
}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

# What Lightning says of the machine and of how it is used here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]


@pytest.fixture
def enabled():
    with fastinit.lightning.enabled():
        yield


class Net(nn.Module):
    """Every kind of initialization that Lightning's empty_init knows or misses, ties, buffers, a named dtype."""

    def __init__(self, width=6):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2)
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        init.trunc_normal_(self.first.weight, std=0.02)
        init.orthogonal_(self.last.weight)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        self.bare = nn.Parameter(torch.randn(3, width) * 2)
        self.register_buffer("table", torch.exp(torch.arange(float(width)) / 7))
        self.register_buffer("named", torch.arange(width, dtype=torch.float32) / 3)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.norm(self.last(self.tied(self.first(x)))) * self.bare.sum(0)


class Module(lightning.LightningModule):
    """The same as a LightningModule that can be trained."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, index):
        return self.net(batch.to(self.dtype)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Hooked(Module):
    """Creates its network in configure_model."""

    def __init__(self):
        lightning.LightningModule.__init__(self)
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Net()


def trainer(**how):
    return lightning.Trainer(**(_on_cpu(how) | {"max_steps": 2} | QUIET | how))


def fabric(**how):
    return lightning.Fabric(**(_on_cpu(how) | how))


def _on_cpu(how):
    # A strategy for a single device brings its own.
    brings = isinstance(how.get("strategy"), (FabricSingleDevice, SingleDeviceStrategy))
    return {} if brings else {"accelerator": "cpu", "devices": 1}


FRAMEWORKS = pytest.mark.parametrize("framework", [trainer, fabric])


def data(rows=8):
    return torch.utils.data.DataLoader(torch.linspace(-1, 1, rows * 6).view(rows, 6), batch_size=4)


def reference(constructor, dtype):
    """The same model, created by fastinit itself."""
    torch.manual_seed(SEED)
    with fastinit.on("cpu", dtype):
        return constructor()


def assert_same(model, expected):
    """Fail unless two models have the same state, bit for bit, and the same ties."""
    one, other = model.state_dict(), expected.state_dict()
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.device == other[name].device, name
        assert same_bits(tensor, other[name]), name
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]


# --- Trainer.init_module, Fabric.init_module, Fabric.init_tensor ------------------------------------------------------


@FRAMEWORKS
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("how", [{}, {"empty_init": None}, {"empty_init": False}])
def test_init_module_gives_what_fastinit_gives(enabled, framework, precision, how):
    if framework is trainer and precision == "16-mixed":
        pytest.skip("the Trainer refuses it on a CPU")
    host = framework(precision=precision)
    torch.manual_seed(SEED)
    with host.init_module(**how):
        model = Net()
        assert torch.get_default_dtype() == DTYPES[precision]
    after = torch.get_rng_state()
    assert torch.get_default_dtype() == torch.float32
    assert_same(model, reference(Net, DTYPES[precision]))
    assert model.tied.weight is model.first.weight and model.named.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), after), "the generator moves by one draw"
    exact = torch.exp(torch.arange(6.0) / 7)
    assert same_bits(model.table, exact.to(DTYPES[precision])), "buffers are computed in fp32 and rounded once"


@FRAMEWORKS
@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "32-true", "bf16-mixed"])
def test_empty_init_leaves_out_every_random_fill_and_no_other(enabled, framework, precision):
    torch.manual_seed(SEED)
    with framework(precision=precision).init_module(empty_init=True):
        model = Net()
    unwritten = fastinit.uninitialized(model)
    random = {"bare", "attention.in_proj_weight", "attention.out_proj.weight", "first.weight", "first.bias"}
    assert set(unwritten) == random | {"last.weight", "last.bias"}
    assert torch.equal(model.norm.weight, torch.ones_like(model.norm.weight)), "constants are there"
    with pytest.raises(RuntimeError, match="was created without values"):
        model(torch.zeros(2, 6))
    fastinit.initialize(model)
    assert_same(model, reference(Net, DTYPES[precision]))


@FRAMEWORKS
@pytest.mark.parametrize("how", [{}, {"empty_init": False}, {"empty_init": True}])
def test_fp64_is_fastinits_too(enabled, framework, how):
    torch.manual_seed(SEED)
    with framework(precision="64-true").init_module(**how):
        model = Net()
    assert torch.get_default_dtype() == torch.float32
    fastinit.initialize(model)
    assert_same(model, reference(Net, torch.float64))


def test_seed_everything_decides_and_the_draws_are_not_torchs(enabled):
    def create():
        lightning.seed_everything(11, verbose=False)
        with trainer().init_module():
            return nn.Linear(9, 9)

    model = create()
    assert torch.equal(create().weight, model.weight)
    fastinit.lightning.disable()
    assert not torch.equal(create().weight, model.weight)


@pytest.mark.parametrize("precision", DTYPES)
def test_init_tensor_creates_tensors_in_the_dtype_of_the_precision(enabled, precision):
    torch.manual_seed(SEED)
    with fabric(precision=precision).init_tensor():
        tensor, named = torch.rand(5), torch.zeros(2, dtype=torch.int64)
    torch.manual_seed(SEED)
    with fastinit.on("cpu", DTYPES[precision]):
        expected = torch.rand(5)
    assert tensor.dtype == DTYPES[precision] and same_bits(tensor, expected)
    assert named.dtype == torch.int64


@FRAMEWORKS
@pytest.mark.parametrize("precision", ["16-true", "64-true"])
@pytest.mark.parametrize("how", [{}, {"empty_init": True}])
def test_an_exception_restores_everything(enabled, framework, precision, how):
    modes = torch._C._len_torch_function_stack()
    empty, register = torch.empty, nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError), framework(precision=precision).init_module(**how):
        nn.Linear(2, 2)
        1 / 0  # noqa: B018
    assert torch.get_default_dtype() == torch.float32 and torch._C._len_torch_function_stack() == modes
    assert torch.empty is empty and nn.Module.register_parameter is register
    assert torch.zeros(1).dtype == torch.float32


@pytest.mark.parametrize("precision", ["16-true", "64-true"])
def test_a_context_that_is_not_entered_does_nothing(enabled, precision):
    modes, before = torch._C._len_torch_function_stack(), torch.get_rng_state()
    host = fabric(precision=precision)
    contexts = [host.init_module(), host.init_module(empty_init=True), host.init_tensor()]
    assert torch.get_default_dtype() == torch.float32 and torch._C._len_torch_function_stack() == modes
    assert torch.equal(torch.get_rng_state(), before) and len(contexts) == 3


def test_contexts_nest_with_those_of_fastinit_and_of_torch(enabled):
    with fastinit.on("cpu", "bf16"), torch.device("meta"):
        outer = nn.Linear(2, 2)
        with fabric(precision="16-true").init_module():
            inner = nn.Linear(2, 2)
    assert outer.weight.is_meta and outer.weight.dtype == torch.bfloat16
    assert inner.weight.device.type == "cpu" and inner.weight.dtype == torch.float16


def test_another_accelerators_device_remains_lightnings_and_is_logged(enabled, caplog):
    strategy = FabricSingleDevice(device=torch.device("meta"))
    with caplog.at_level("INFO", "fastinit"), strategy.module_init_context():
        assert nn.Linear(2, 2).weight.is_meta
    assert caplog.messages == ["Lightning creates this model: fastinit has no torch.float32 on meta"]


def test_what_enable_has_done_and_does_is_logged(caplog):
    with caplog.at_level("INFO", "fastinit"), fastinit.lightning.enabled(), fabric(precision="bf16-true").init_module():
        layer = nn.Linear(6, 6)
    assert layer.weight.dtype == torch.bfloat16
    first, second = caplog.messages
    assert first.startswith("lightning.enable: strategies of lightning.fabric, lightning.pytorch")
    assert second.startswith("42 parameters, 84 B in bfloat16 on cpu: ")


class Small(Hooked):
    def configure_model(self):
        self.net = nn.Linear(6, 6)


class Replaced(nn.Linear):
    """What a plugin puts in the place of nn.Linear."""


@pytest.mark.parametrize("hook", [False, True])
def test_a_plugin_that_replaces_classes_keeps_lightnings_way(enabled, hook):
    # As the plugins for bitsandbytes and transformer-engine do, which need a GPU.
    plugins = "lightning.pytorch.plugins" if hook else "lightning.fabric.plugins"
    half = __import__(plugins, fromlist=["HalfPrecision"]).HalfPrecision

    class Replacing(half):
        def module_init_context(self):
            return precision_utils._ClassReplacementContextManager({"torch.nn.Linear": Replaced})

    torch.manual_seed(SEED)
    if hook:
        model = Small()
        trainer(plugins=Replacing("bf16-true")).fit(model, data())
        layer = model.net
    else:
        with fabric(plugins=Replacing("bf16-true")).init_module():
            layer = nn.Linear(6, 6)
    torch.manual_seed(SEED)
    assert type(layer) is Replaced
    if not hook:
        assert torch.equal(Replaced(6, 6).weight, layer.weight), "torch's own draws"


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Larger(Module):
    """Needs more than a checkpoint of Module has; training_step uses a parameter of the LightningModule itself."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.empty(6).normal_())

    def training_step(self, batch, index):
        return (self.net(self.extra(batch.to(self.dtype))) * self.scale).square().mean()


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.ckpt"
    module = reference(Module, "fp32")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": lightning.__version__}, path)
    return path, module.state_dict()


@pytest.mark.parametrize("how", [{}, {"empty_init": True}])
@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "32-true"])
def test_load_from_checkpoint_in_init_module_gives_the_checkpoints_values_and_trains(
    enabled, checkpoint, precision, how
):
    path, state = checkpoint
    host = trainer(precision=precision)
    with host.init_module(**how):
        model = Module.load_from_checkpoint(path)
    assert fastinit.uninitialized(model) == []
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, state[name].to(tensor.dtype)), name
    assert model.net.first.weight.dtype == DTYPES[precision]
    host.fit(model, data())
    assert host.global_step == 2


def test_what_the_checkpoint_lacks_is_initialized_or_named(enabled, checkpoint):
    path, _ = checkpoint
    host = trainer(precision="bf16-true")
    torch.manual_seed(SEED)
    with host.init_module(empty_init=True):
        model = Larger.load_from_checkpoint(path, strict=False)
    expected = reference(Larger, "bf16")
    assert fastinit.uninitialized(model) == ["extra.weight", "extra.bias"]
    assert same_bits(model.scale, expected.scale), "nothing calls the LightningModule: what it owns is initialized"
    with pytest.raises(RuntimeError, match=r"extra\.(weight|bias) .*was created without values"):
        host.fit(model, data())
    fastinit.initialize(model)
    assert same_bits(model.extra.weight, expected.extra.weight)
    torch.manual_seed(SEED)
    with host.init_module():
        whole = Larger.load_from_checkpoint(path, strict=False)
    assert same_bits(whole.extra.weight, expected.extra.weight), "without empty_init it has been initialized"


# --- configure_model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["as a string", "as an object"])
@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "32-true", "bf16-mixed"])
def test_configure_model_creates_what_fastinit_creates_and_fit_trains_it(enabled, given, precision):
    model, created = Hooked(), {}
    strategy = "auto" if given == "as a string" else SingleDeviceStrategy(device="cpu")

    class Look(lightning.Callback):
        def on_fit_start(self, trainer, module):
            created.update({name: tensor.clone() for name, tensor in module.net.state_dict().items()})

    torch.manual_seed(SEED)
    trainer(strategy=strategy, precision=precision, callbacks=Look()).fit(model, data())
    expected = reference(Net, DTYPES[precision]).state_dict()
    for name, tensor in created.items():
        # Lightning converts the module as a whole afterwards, also what the code gave a dtype.
        assert same_bits(tensor, expected[name].to(tensor.dtype)), name
        assert tensor.dtype in (DTYPES[precision], torch.int64), name
    assert torch.get_default_dtype() == torch.float32


# --- the switches -----------------------------------------------------------------------------------------------------


def _methods():
    found = {}
    for package in ("lightning.fabric", "lightning.pytorch"):
        for path, method, _ in fastinit.lightning._methods(package):
            owner = fastinit.lightning._class(package, path)
            found[owner, method] = vars(owner)[method]
    return found


def test_disable_puts_every_method_back():
    originals = _methods()
    fastinit.lightning.enable()
    once = _methods()
    fastinit.lightning.enable()
    assert _methods() == once and not set(once.values()) & set(originals.values())
    fastinit.lightning.disable()
    assert all(method is originals[key] for key, method in _methods().items())
    fastinit.lightning.disable()
    with pytest.raises(ZeroDivisionError), fastinit.lightning.enabled():
        assert _methods().keys() == originals.keys() and _methods() != originals
        with fastinit.lightning.enabled():
            pass
        assert _methods() != originals, "the inner block leaves it enabled"
        1 / 0  # noqa: B018
    assert all(method is originals[key] for key, method in _methods().items())


def test_the_mix_in_concerns_its_strategy_alone():
    class FastTrainer(fastinit.lightning.FastInit, SingleDeviceStrategy):
        pass

    class FastFabric(fastinit.lightning.FastInit, FabricSingleDevice):
        pass

    expected = reference(Net, "fp16")
    for host in (
        trainer(strategy=FastTrainer(device="cpu"), precision="16-true"),
        fabric(strategy=FastFabric(device="cpu"), precision="16-true"),
    ):
        torch.manual_seed(SEED)
        with host.init_module():
            model = Net()
        assert_same(model, expected)
    torch.manual_seed(SEED)
    with trainer(precision="16-true").init_module(), pytest.raises(NotImplementedError, match="geqrf"):
        Net()  # torch has no QR in half precision, fastinit needs none
    with trainer(strategy=FastTrainer(device="cpu"), precision="64-true").init_module():
        assert nn.Linear(2, 2).weight.dtype == torch.float64


def test_a_method_that_the_strategys_own_class_overrides_stays_its_own():
    class Mine(fastinit.lightning.FastInit, SingleDeviceStrategy):
        def tensor_init_context(self, empty_init=None):
            return torch.device("meta")

    class Child(Mine):
        pass

    for strategy in (Mine(device="cpu"), Child(device="cpu")):
        with trainer(strategy=strategy).init_module():
            assert nn.Linear(2, 2).weight.is_meta


def test_the_examples_in_docstrings_run():
    names = {"fastinit": fastinit, "lightning": lightning, "torch": torch}
    result = doctest.testmod(fastinit.lightning, extraglobs=names)
    assert result.attempted and not result.failed


def test_importing_fastinit_lightning_imports_no_framework():
    code = """
import sys
import fastinit.lightning
assert not {"lightning", "pytorch_lightning", "lightning_fabric"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_the_packages_that_are_published_separately_work_without_the_common_one():
    pytest.importorskip("pytorch_lightning")
    code = """
import sys, warnings
import pytorch_lightning, lightning_fabric, torch
import fastinit.lightning
warnings.simplefilter("ignore")
fastinit.lightning.enable()
assert "lightning" not in sys.modules
for host in (pytorch_lightning.Trainer(accelerator="cpu", precision="16-true", logger=False, barebones=True),
             lightning_fabric.Fabric(accelerator="cpu", devices=1, precision="16-true")):
    torch.manual_seed(1)
    with host.init_module():
        model = torch.nn.Linear(3, 3)
    torch.manual_seed(1)
    with fastinit.on("cpu", "fp16"):
        expected = torch.nn.Linear(3, 3)
    assert torch.equal(expected.weight, model.weight)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# --- strategies of several processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory)
    yield ranks
    ranks.end()


def _join():
    """Make this process, which has its process group, one that Lightning takes for a launched one."""
    launched()
    warnings.simplefilter("ignore")
    torch.manual_seed(100 + torch.distributed.get_rank())
    fastinit.lightning.enable()


def _strategy(cls, precision, **how):
    """A strategy of Fabric or of the Trainer on this rank's CPU, as Lightning's connector would have made it."""
    package = "pytorch" if cls.__module__.startswith("lightning.pytorch") else "fabric"
    accelerators = __import__(f"lightning.{package}.accelerators", fromlist=["CPUAccelerator"])
    strategy = cls(**how)
    strategy.accelerator = accelerators.CPUAccelerator()
    strategy.parallel_devices = [torch.device("cpu")] * torch.distributed.get_world_size()
    strategy.cluster_environment = LightningEnvironment()
    setattr(strategy, "precision_plugin" if package == "pytorch" else "precision", precision)
    return strategy


@contextmanager
def _configure_model(strategy):
    """The contexts in which the Trainer calls that hook."""
    with (
        strategy.tensor_init_context(),
        strategy.model_sharded_context(),
        strategy.precision_plugin.module_init_context(),
    ):
        yield


def _check_ddp(precision):
    _join()
    dtype = DTYPES[precision]
    results = {}
    for name, strategy in (("string", "ddp"), ("object", DDPStrategy())):
        model = Hooked()
        host = trainer(strategy=strategy, devices=2, precision=precision, use_distributed_sampler=False)
        host.fit(model, data())
        results[name] = model.state_dict()
    host = fabric(strategy="ddp", devices=2, precision=precision)
    host.launch()
    torch.manual_seed(SEED)
    for how in ({}, {"empty_init": True}):
        with host.init_module(**how):
            model = Net()
        if how:
            assert fastinit.uninitialized(model)
            fastinit.initialize(model)
        else:
            assert_same(model, reference(Net, dtype))
    model, optimizer = host.setup(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    loss = model(torch.ones(4, 6)).float().square().mean()
    host.backward(loss)
    optimizer.step()
    results["fabric"] = model.state_dict()
    return results


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "32-true", "bf16-mixed"])
def test_ddp_trains_one_model_on_all_ranks(ranks, precision):
    one, other = ranks.run(_check_ddp, precision, world=2)
    for way, state in one.items():
        for name, tensor in state.items():
            assert tensor.dtype in (DTYPES[precision], torch.int64, torch.float32)
            assert torch.isfinite(tensor).all() and same_bits(tensor, other[way][name]), f"{way}: {name}"


class Blocks(nn.Module):
    """Layers to shard, one of them without reset_parameters; values that FSDP's own way loses."""

    def __init__(self, width=10):
        super().__init__()
        self.embedding = nn.Embedding(7, width, padding_idx=1)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        for layer in self.layers:
            init.orthogonal_(layer.weight)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.register_buffer("table", torch.exp(torch.arange(float(width)) / 7))

    def forward(self, tokens):
        hidden = self.embedding(tokens) * self.scale * self.table
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def _fsdp_class_for_cpu():
    from torch.distributed.fsdp import FullyShardedDataParallel

    class OnCPU(FullyShardedDataParallel):
        def __init__(self, module, *, device_id=None, mixed_precision=None, **how):
            # Lightning tells FSDP the index of the GPU; without one FSDP looks for an accelerator.
            super().__init__(module, device_id=torch.device("cpu"), **how)

    return OnCPU


def _replace_fsdp():
    from torch.distributed import fsdp

    fsdp.FullyShardedDataParallel = fsdp.fully_sharded_data_parallel.FullyShardedDataParallel = _fsdp_class_for_cpu()


def _seed_of_rank_0():
    torch.manual_seed(100)


def _assert_fsdp_is(wrapped, dtype):
    _seed_of_rank_0()
    with fastinit.on("cpu", dtype):
        expected = Blocks()
    from torch.distributed import fsdp

    with fsdp.FullyShardedDataParallel.summon_full_params(wrapped):
        inner = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in wrapped.named_parameters()}
        for name, tensor in expected.named_parameters():
            assert same_bits(inner[name], tensor), name
    assert same_bits(dict(wrapped.named_buffers())["_fsdp_wrapped_module.table"], expected.table)
    assert wrapped(torch.zeros(2, 3, dtype=torch.long)).isfinite().all()


def _check_fsdp(precision):
    _join()
    _replace_fsdp()
    from lightning.fabric.plugins.precision import FSDPPrecision as FabricPrecision
    from lightning.fabric.strategies import FSDPStrategy as FabricFSDP
    from lightning.pytorch.plugins import FSDPPrecision
    from lightning.pytorch.strategies import FSDPStrategy

    dtype = DTYPES[precision]
    for how, on_meta in (({"empty_init": True}, True), ({}, False), ({"empty_init": False}, False)):
        strategy = _strategy(FabricFSDP, FabricPrecision(precision))
        _join()
        with strategy.module_init_context(**how):
            model = Blocks()
        assert all(parameter.is_meta == on_meta for parameter in model.parameters())
        assert {parameter.dtype for parameter in model.parameters()} == {dtype} and not model.table.is_meta
        _assert_fsdp_is(strategy.setup_module(model), dtype)

    strategy = _strategy(FSDPStrategy, FSDPPrecision(precision))
    _join()
    with _configure_model(strategy):
        model = Blocks()
    assert all(parameter.is_meta for parameter in model.parameters())
    _assert_fsdp_is(strategy._setup_model(model), dtype)
    _join()
    with strategy.tensor_init_context(empty_init=None):
        assert not Blocks().scale.is_meta


@pytest.mark.parametrize("precision", DTYPES)
def test_fsdp_shards_have_the_values_of_one_model_on_all_ranks(ranks, precision):
    ranks.run(_check_fsdp, precision, world=2)


def _check_layers_wrapped_by_hand():
    _join()
    _replace_fsdp()
    from lightning.pytorch.plugins import FSDPPrecision
    from lightning.pytorch.strategies import FSDPStrategy
    from torch.distributed import fsdp

    strategy = _strategy(FSDPStrategy, FSDPPrecision("bf16-true"))
    with _configure_model(strategy):
        model = nn.Sequential(*(fsdp.wrap.wrap(nn.Linear(4, 4)) for _ in range(2)))
    assert all(isinstance(layer, fsdp.FullyShardedDataParallel) for layer in model)
    _seed_of_rank_0()
    with fastinit.on("cpu", "bf16"):
        expected = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
    for layer, whole in zip(model, expected, strict=True):
        with fsdp.FullyShardedDataParallel.summon_full_params(layer):
            assert same_bits(layer.module.weight, whole.weight)


def test_layers_that_configure_model_wraps_itself_have_their_values(ranks):
    ranks.run(_check_layers_wrapped_by_hand, world=2)


def _check_fsdp_of_what_was_created_on_meta():
    _join()
    _replace_fsdp()
    from lightning.fabric.plugins.precision import FSDPPrecision
    from lightning.fabric.strategies import FSDPStrategy

    strategy = _strategy(FSDPStrategy, FSDPPrecision("32-true"))
    with strategy.module_init_context(empty_init=True), torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    wrapped = strategy.setup_module(model)
    assert all(0 < p.abs().max() <= 0.5 for p in wrapped.parameters() if p.numel()), "reset_parameters was called"


def test_what_the_code_puts_on_meta_is_initialized_as_fsdp_does_it(ranks):
    ranks.run(_check_fsdp_of_what_was_created_on_meta, world=2)


def _mesh(strategy):
    from torch.distributed.device_mesh import init_device_mesh

    strategy._device_mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    return strategy


def _fully_shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def _assert_shards_are(model, dtype):
    _seed_of_rank_0()
    with fastinit.on("cpu", dtype):
        expected = Blocks()
    assert model.head.weight is model.embedding.weight
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.full_tensor(), expected.get_parameter(name)), name
    assert same_bits(model.table, expected.table)
    assert model(torch.zeros(2, 3, dtype=torch.long)).isfinite().all()


def _check_model_parallel(precision):
    _join()
    from lightning.fabric.plugins.precision import HalfPrecision as FabricHalf
    from lightning.fabric.plugins.precision import Precision as FabricPrecision
    from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallel
    from lightning.pytorch.plugins import HalfPrecision, Precision
    from lightning.pytorch.strategies import ModelParallelStrategy

    dtype = DTYPES[precision]
    plugin = FabricHalf(precision) if dtype != torch.float32 else FabricPrecision()
    for how, on_meta in (({"empty_init": True}, True), ({}, False), ({"empty_init": False}, False)):
        strategy = _mesh(_strategy(FabricModelParallel, plugin, parallelize_fn=_fully_shard))
        _join()
        with strategy.module_init_context(**how):
            model = Blocks()
        assert all(parameter.is_meta == on_meta for parameter in model.parameters())
        _assert_shards_are(strategy.setup_module(model), dtype)
        assert strategy._parallelize_fn is _fully_shard

    class Model(lightning.LightningModule):
        def configure_model(self):
            self.net = _fully_shard(Blocks(), strategy.device_mesh)

    plugin = HalfPrecision(precision) if dtype != torch.float32 else Precision()
    strategy = _mesh(_strategy(ModelParallelStrategy, plugin))
    _join()
    model = Model()
    with _configure_model(strategy):
        model.configure_model()
    assert all(parameter.is_meta for parameter in model.parameters())
    strategy.model = strategy._lightning_module = model
    strategy.setup(types.SimpleNamespace(state=types.SimpleNamespace(fn=None)))
    _assert_shards_are(model.net, dtype)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "32-true"])
def test_shards_of_model_parallel_have_the_values_of_one_model_on_all_ranks(ranks, precision):
    ranks.run(_check_model_parallel, precision, world=2)


def _check_partly_on_meta():
    _join()
    from lightning.fabric.plugins.precision import Precision
    from lightning.fabric.strategies import ModelParallelStrategy

    def parallelize(model, mesh):
        model.add_module("other", other)
        return _fully_shard(model, mesh)

    with torch.device("meta"):
        other = nn.Linear(10, 10)
    strategy = _mesh(_strategy(ModelParallelStrategy, Precision(), parallelize_fn=parallelize))
    _join()
    with strategy.module_init_context(empty_init=True):
        model = Blocks()
    model = strategy.setup_module(model)
    weight = model.other.weight.full_tensor()
    assert 0 < weight.abs().max() <= 10**-0.5, "reset_parameters was called"
    del model.other
    _seed_of_rank_0()
    with fastinit.on("cpu"):
        expected = Blocks()
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.full_tensor(), expected.get_parameter(name)), name
    assert same_bits(model.table, expected.table)


def test_what_was_not_recorded_is_left_to_lightning_and_the_rest_has_its_values(ranks):
    ranks.run(_check_partly_on_meta, world=2)


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepspeed_ranks(tmp_path_factory):
    pytest.importorskip("deepspeed")
    ranks = Ranks(2, tmp_path_factory)
    yield ranks
    ranks.end()


def _check_deepspeed(precision):
    launched_by_deepspeed()
    _join()
    from lightning.fabric.plugins.precision import DeepSpeedPrecision as FabricPrecision
    from lightning.fabric.strategies import DeepSpeedStrategy as FabricDeepSpeed
    from lightning.pytorch.plugins import DeepSpeedPrecision
    from lightning.pytorch.strategies import DeepSpeedStrategy

    for stage in (1, 2, 3):
        _check_fabrics_deepspeed(_strategy(FabricDeepSpeed, FabricPrecision(precision), stage=stage), precision)
        strategy = _strategy(DeepSpeedStrategy, DeepSpeedPrecision(precision), stage=stage)
        _check_trainers_deepspeed(strategy, precision)


def _check_partitions(model, precision):
    import deepspeed

    dtype = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}[precision.split("-")[0]]
    _seed_of_rank_0()
    with fastinit.on("cpu", dtype):
        expected = Blocks()
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 0 and parameter.ds_tensor.dtype == dtype
        with deepspeed.zero.GatheredParameters(parameter):
            assert same_bits(parameter, expected.get_parameter(name)), name
    assert same_bits(model.table, expected.table)


def _check_fabrics_deepspeed(strategy, precision):
    strategy._format_config()
    strategy._config_initialized = True
    hows = ({}, {"empty_init": False}, {"empty_init": True}) if strategy.zero_stage_3 else ({}, {"empty_init": False})
    for how in hows:
        _join()
        with strategy.module_init_context(**how):
            model = Blocks()
        _check_deepspeeds(model, strategy, precision)


def _check_trainers_deepspeed(strategy, precision):
    _join()
    with strategy.tensor_init_context(empty_init=False):
        model = Blocks()
    dtype = torch.float32 if strategy.zero_stage_3 else DTYPES[precision]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} and model.scale.numel() == 10
    host = types.SimpleNamespace(accumulate_grad_batches=1, gradient_clip_val=None)
    strategy._lightning_module = types.SimpleNamespace(trainer=host)
    strategy.config["train_micro_batch_size_per_gpu"] = 1
    _join()
    with _configure_model(strategy):
        model = Blocks()
    _check_deepspeeds(model, strategy, precision)


def _check_deepspeeds(model, strategy, precision):
    if strategy.zero_stage_3:
        _check_partitions(model, precision)
        return
    torch.manual_seed(100 + torch.distributed.get_rank())
    with fastinit.on("cpu", DTYPES[precision]):
        expected = Blocks()
    assert_same(model, expected)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "32-true", "16-mixed", "bf16-mixed"])
def test_deepspeed_of_every_stage_creates_the_values_of_one_model(deepspeed_ranks, precision):
    deepspeed_ranks.run(_check_deepspeed, precision, world=2)


def _check_what_zero3_does_not_support():
    launched_by_deepspeed()
    _join()
    from lightning.fabric.plugins.precision import DeepSpeedPrecision
    from lightning.fabric.strategies import DeepSpeedStrategy

    strategy = _strategy(DeepSpeedStrategy, DeepSpeedPrecision("32-true"), stage=3, remote_device="nvme")
    strategy._format_config()
    with pytest.warns(UserWarning, match=r"DeepSpeed's own zero\.Init.*remote_device='nvme'"):
        assert fastinit.lightning._partitions(strategy, strategy.precision) is None


def test_what_the_partitions_do_not_support_is_left_to_deepspeed_with_a_warning(deepspeed_ranks):
    deepspeed_ranks.run(_check_what_zero3_does_not_support, world=2)
