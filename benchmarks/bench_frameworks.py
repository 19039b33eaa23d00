"""What Lightning's scripts cost with fastinit enabled and without, in new processes, bf16-true.

`fabric.init_module()` on one device: Lightning and the GPU are initialized and a tensor has been allocated when the
clock starts. A Trainer on two: from its `fit`, whose `configure_model` creates the model, to the end of the first step
of training, the peak of memory beyond that of the weights that a rank holds, and the growth of the host's: of the
slower or larger rank.

First: the first model of the process; on a GPU, torch loads each kernel at its first use. Second: another one, after
the first was freed and torch's allocator gave its memory back.
"""

import time
import warnings
from contextlib import nullcontext

import peers
import pytest
import torch

from fastinit.cli import measure, text
from fastinit.cli.models import LLAMA_7B, Decoder, DecoderConfig, DecoderLayer

WHEN = ("first", "second")


@pytest.mark.parametrize("way", ["fastinit", "Lightning alone"])
@pytest.mark.parametrize("when", WHEN)
def test_fabric(figure, once, main_device, quick, when, way):
    config = peers.shape_for(main_device, quick, on_cpu=100_000_000)
    with figure(f"fabric.init_module, {text.count(config.parameters)}, {when} model, {main_device}", way) as record:
        peers.require("lightning")
        rounds = once(runs, way == "fastinit", config, main_device.type, 1 if quick else 4)
        record([each[WHEN.index(when)] for each in rounds[-3:]])  # the first one reads the packages from disk


def runs(enabled, config, device_type, rounds):
    return [measure.in_new_process(create, enabled, config, device_type) for _ in range(rounds)]


def create(enabled, config, device_type):
    """Seconds of the first and of the second creation."""
    import lightning

    import fastinit.lightning

    device = torch.device(device_type)
    with fastinit.lightning.enabled() if enabled else nullcontext():
        fabric = lightning.Fabric(accelerator=device_type, devices=1, precision="bf16-true")
        torch.ones(1, device=device).sum().item()

        def model():
            with fabric.init_module():
                return Decoder(config)

        seconds = []
        for _ in WHEN:
            measure.clean_up(device)
            taken, created = measure.seconds_of(model, device)
            assert {(each.dtype, each.device.type) for each in created.parameters()} == {(torch.bfloat16, device_type)}
            seconds.append(taken)
            del created
    return seconds


# A Trainer on two devices


STRATEGIES = ("DDP", "FSDP1", "FSDP2", "DeepSpeed 3")


@pytest.mark.parametrize("way", ["fastinit", "Lightning alone"])
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_first_step(figure, once, main_device, quick, strategy, when, way):
    gpus = torch.cuda.device_count() if main_device.type == "cuda" else 0
    small = DecoderConfig.of_size(1_000_000)
    # Lightning alone creates it on the CPU under FSDP, by one thread.
    config = LLAMA_7B.with_layers(4) if gpus and not quick else small
    case = f"{strategy}, {text.count(config.parameters)}, first step of the {when} fit, 2 ranks, {main_device.type}"
    with figure(case, way) as record:
        if gpus == 1 or (not gpus and strategy in ("FSDP1", "DeepSpeed 3")):
            raise peers.Unavailable("unsupported: needs two GPUs")
        peers.require("lightning", "deepspeed" if strategy.startswith("DeepSpeed") else None)
        if gpus:  # the first processes that train on a machine read libraries from disk
            once(measure.on_ranks, fit_twice, 2, main_device.type, True, "DDP", small)
        of_ranks = once(measure.on_ranks, fit_twice, 2, main_device.type, way == "fastinit", strategy, config)
        seconds, beyond, host_growth = (
            None if None in figures else max(figures)
            for figures in zip(*(of_rank[WHEN.index(when)] for of_rank in of_ranks), strict=True)
        )
        record([seconds], beyond=beyond, host_growth=host_growth)


def fit_twice(device, enabled, strategy, config):
    """Of a first and a second fit: seconds to the end of the first step, bytes beyond the weights, the host's bytes."""
    import lightning
    from torch.distributed.fsdp import fully_shard

    import fastinit.lightning

    if strategy == "DeepSpeed 3":
        peers.require("deepspeed")  # imports it, which is no part of a fit

    warnings.simplefilter("ignore")

    class Learner(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = None

        def configure_model(self):
            if self.model is None:
                self.model = Decoder(config)
                if strategy == "FSDP2":
                    for layer in self.model.layers:
                        fully_shard(layer, mesh=self.device_mesh["data_parallel"])
                    fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

        def training_step(self, tokens, index):
            logits = self.model(tokens)
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class Watch(lightning.Callback):
        def on_train_start(self, trainer, learner):
            self.weights = sum(memory_of(each) for each in learner.parameters())

        def on_train_batch_end(self, trainer, learner, *others):
            measure.synchronize(device)
            self.ended = time.perf_counter()

    def memory_of(parameter):
        local = getattr(parameter, "ds_tensor", parameter)
        return getattr(local, "_local_tensor", local).nbytes

    def plan():
        strategies = lightning.pytorch.strategies
        if strategy == "FSDP1":
            return strategies.FSDPStrategy(auto_wrap_policy={DecoderLayer})
        if strategy == "FSDP2":
            return strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        return "ddp" if strategy == "DDP" else strategies.DeepSpeedStrategy(stage=3)

    data = torch.arange(4 * 32).remainder(config.vocabulary).view(4, 32)
    results = []
    with fastinit.lightning.enabled() if enabled else nullcontext():
        for _ in WHEN:
            watch = Watch()
            trainer = lightning.Trainer(
                accelerator=device.type, devices=2, precision="bf16-true", strategy=plan(), max_steps=1,
                callbacks=watch, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False,
            )  # fmt: skip
            measure.clean_up(device)
            # The first fit finds a communicator that has been used, and no fit waits for the other rank's last one.
            torch.distributed.all_reduce(torch.ones(1, device=device))
            measure.synchronize(device)
            memory, began = measure.Memory(device), time.perf_counter()
            trainer.fit(Learner(), torch.utils.data.DataLoader(data, batch_size=2))
            peak = memory.device_peak()
            beyond = None if peak is None else peak - watch.weights
            results.append((watch.ended - began, beyond, memory.host_growth()))
            del trainer, watch
    return results
