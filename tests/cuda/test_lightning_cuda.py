"""Lightning on a GPU with fastinit enabled: the CPU's bits, on the GPU from the start, loaded and trained there."""

import pytest
import torch
from models import same_bits
from torch import nn

import fastinit
import fastinit.lightning

lightning = pytest.importorskip("lightning")

SEED = 5
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "32-true": torch.float32, "16-mixed": torch.float32}
PRECISIONS = pytest.mark.parametrize("precision", DTYPES)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


@pytest.fixture(autouse=True)
def enabled():
    with fastinit.lightning.enabled():
        yield


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 64), nn.Linear(64, 64))
        nn.init.trunc_normal_(self[0].weight, std=0.02)
        nn.init.orthogonal_(self[2].weight)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, index):
        return self.net(batch.to(self.dtype)).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Hooked(Module):
    def __init__(self):
        lightning.LightningModule.__init__(self)
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Net()


def data():
    return torch.utils.data.DataLoader(torch.linspace(-1, 1, 12 * 64).view(12, 64), batch_size=4)


def trainer(precision, **how):
    how = {"accelerator": "cuda", "devices": 1, "max_steps": 3} | QUIET | how
    return lightning.Trainer(precision=precision, **how)


def on_cpu(constructor, dtype):
    torch.manual_seed(SEED)
    with fastinit.on("cpu", dtype):
        return constructor()


def assert_on_gpu_with_bits_of(model, expected):
    values = expected.state_dict()
    assert list(model.state_dict()) == list(values)
    for name, tensor in model.state_dict().items():
        assert tensor.device == torch.device("cuda", 0) and tensor.dtype == values[name].dtype, name
        assert same_bits(tensor.cpu(), values[name]), name


@PRECISIONS
@pytest.mark.parametrize("framework", ["trainer", "fabric"])
def test_init_module_creates_on_the_gpu_what_the_cpu_would_have(framework, precision):
    if framework == "trainer":
        host = trainer(precision)
    else:
        host = lightning.Fabric(accelerator="cuda", devices=1, precision=precision)
    torch.manual_seed(SEED)
    with host.init_module():
        model = Net()
    assert torch.get_default_dtype() == torch.float32
    assert_on_gpu_with_bits_of(model, on_cpu(Net, DTYPES[precision]))
    torch.manual_seed(SEED)
    with host.init_module(empty_init=True):
        model = Net()
    assert len(fastinit.uninitialized(model)) == 6
    fastinit.initialize(model)
    assert_on_gpu_with_bits_of(model, on_cpu(Net, DTYPES[precision]))


@PRECISIONS
def test_a_model_of_init_module_is_trained(precision):
    host = trainer(precision)
    with host.init_module():
        model = Module()
    host.fit(model, data())
    assert host.global_step == 3 and all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_configure_model_creates_on_the_gpu(precision):
    created = {}

    class Look(lightning.Callback):
        def on_fit_start(self, trainer, module):
            created.update({name: tensor.cpu() for name, tensor in module.net.state_dict().items()})

    torch.manual_seed(SEED)
    host = trainer(precision, callbacks=Look())
    host.fit(Hooked(), data())
    for name, tensor in on_cpu(Net, DTYPES[precision]).state_dict().items():
        assert same_bits(created[name], tensor), name
    assert host.global_step == 3


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
@pytest.mark.parametrize("saved_on", ["cpu", "cuda"])
def test_load_from_checkpoint_in_empty_init_module_has_its_values_and_is_trained(precision, saved_on, tmp_path):
    class Larger(Module):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(64, 64)

        def training_step(self, batch, index):
            return self.net(self.extra(batch.to(self.dtype))).float().square().mean()

    module = on_cpu(Module, "fp32").to(saved_on)
    state = {name: tensor + 1 for name, tensor in module.state_dict().items()}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state, "pytorch-lightning_version": lightning.__version__}, path)
    host = trainer(precision)
    with host.init_module(empty_init=True):
        model = Module.load_from_checkpoint(path)
    assert fastinit.uninitialized(model) == []
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == saved_on, "Lightning moves the model to where the checkpoint was"
        assert same_bits(tensor.cpu(), state[name].cpu().to(tensor.dtype)), name
    host.fit(model, data())
    torch.manual_seed(SEED)
    with host.init_module(empty_init=True):
        model = Larger.load_from_checkpoint(path, strict=False)
    assert set(fastinit.uninitialized(model)) <= {"extra.weight", "extra.bias"}
    fastinit.initialize(model)
    expected = on_cpu(Larger, DTYPES[precision])
    assert same_bits(model.extra.weight.cpu(), expected.extra.weight)
    host.fit(model, data())
