"""Unchanged scripts of Lightning and Transformers on two GPUs with NCCL, with fastinit enabled and without.

Each way has two processes of its own. With fastinit the weights before the first step are, whole, those of the CPU's
model to the bit, although ranks are seeded differently; both ways train two steps, save, and load what was saved.

Skipped where there are fewer GPUs. With `--gloo` the ranks are two processes on the CPU, where Lightning refuses FSDP1
and DeepSpeed.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from models import SEED, digest
from two_gpus import Block, Model, join, kind, loss_of, shard, whole

import fastinit
import fastinit.lightning

lightning = pytest.importorskip("lightning")
transformers = pytest.importorskip("transformers")

PRECISIONS = {
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "32-true": torch.float32,
}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
STRATEGIES = ("DDP", "FSDP1", "FSDP2", "TP", "DeepSpeed 2", "DeepSpeed 3")


# Scripts, which know nothing of fastinit


def parallelize(model, mesh):
    """As users of ModelParallelStrategy write it."""
    sizes = {name: mesh[name].size() for name in mesh.mesh_dim_names}
    data = mesh["data_parallel"] if sizes["data_parallel"] > 1 else None
    return shard(model, data=data, tensor=mesh["tensor_parallel"] if sizes["tensor_parallel"] > 1 else None)


def strategy_of(name, strategies, **model_parallel):
    if name == "DDP":
        return "ddp"
    if name == "FSDP1":
        return strategies.FSDPStrategy(auto_wrap_policy={Block})
    if name.startswith("DeepSpeed"):
        # With the default the first steps in fp16 would overflow, and be left out.
        return strategies.DeepSpeedStrategy(stage=int(name[-1]), initial_scale_power=4)
    sizes = {"data_parallel_size": 1 + (name == "FSDP2"), "tensor_parallel_size": 1 + (name == "TP")}
    return strategies.ModelParallelStrategy(**sizes, **model_parallel)


def optimizer_of(model):
    # Not foreach: tensor parallelism has DTensors and others.
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)


class Learner(lightning.LightningModule):
    def __init__(self, parallelize=None):
        super().__init__()
        self.net = None
        self.parallelize = parallelize

    def configure_model(self):
        if self.net is None:
            self.net = Model(orthogonal=False)
            if self.parallelize:
                self.parallelize(self.net, self.device_mesh)

    def training_step(self, batch, index):
        return loss_of(self.net, self.device)

    def configure_optimizers(self):
        return optimizer_of(self)


class Watch(lightning.Callback):
    """Notes the weights before the first step and after the last one, and saves them."""

    def __init__(self, path):
        self.path, self.before, self.after = path, None, None

    def on_train_start(self, trainer, learner):
        self.before = whole(learner.net, trainer.strategy.model)

    def on_train_end(self, trainer, learner):
        self.after = whole(learner.net, trainer.strategy.model)
        if self.path:
            trainer.save_checkpoint(self.path)


def with_trainer(name, precision, path):
    """The weights before and after two steps, and what a new trainer has loaded of what was saved."""
    watches = []
    for steps, save_to, load_from in ((2, path, None), (3, None, path)):
        watch = Watch(save_to)
        watches.append(watch)
        trainer = lightning.Trainer(
            accelerator=kind(), devices=2, max_steps=steps, precision=precision, callbacks=watch,
            strategy=strategy_of(name, lightning.pytorch.strategies), **QUIET,
        )  # fmt: skip
        learner = Learner(parallelize if name in ("FSDP2", "TP") else None)
        if name == "DDP":
            with trainer.init_module():
                learner.net = Model(orthogonal=False)
        trainer.fit(learner, torch.utils.data.DataLoader(range(16), batch_size=1), ckpt_path=load_from)
        assert trainer.global_step == steps
    first, second = watches
    return first.before, first.after, second.before


def with_fabric(name, precision, path):
    fabric = lightning.Fabric(
        accelerator=kind(), devices=2, precision=precision,
        strategy=strategy_of(name, lightning.fabric.strategies, parallelize_fn=parallelize),
    )  # fmt: skip
    fabric.launch()

    def set_up():
        with fabric.init_module(empty_init=True if name in ("FSDP1", "FSDP2", "TP") else None):
            model = Model(orthogonal=False)
        if name.startswith("DeepSpeed"):
            return model, *fabric.setup(model, optimizer_of(model))
        module = fabric.setup_module(model)
        return model, module, fabric.setup_optimizers(optimizer_of(module))

    model, module, optimizer = set_up()
    before = whole(model, module._forward_module)
    for _ in range(2):
        fabric.backward(loss_of(module, fabric.device))
        optimizer.step()
        optimizer.zero_grad()
    after = whole(model, module._forward_module)
    fabric.save(path, {"model": module, "optimizer": optimizer})
    other, module, optimizer = set_up()
    fabric.load(path, {"model": module, "optimizer": optimizer})
    return before, after, whole(other, module._forward_module)


def texts():
    tokens = torch.arange(8) + torch.arange(16)[:, None]
    return [{"input_ids": each, "labels": index % 3} for index, each in enumerate(tokens)]


class Notes(transformers.TrainerCallback):
    """The weights before the first step and after the last one."""

    def on_train_begin(self, arguments, state, control, model, **others):
        self.before = whole(model)

    def on_train_end(self, arguments, state, control, model, **others):
        self.after = whole(model)


ENGINES = {
    "FSDP2": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
    "ZeRO-3": {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": True},
        },
        "bf16": True,
    },
}


def with_transformers(engine, create, context, folder):
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=2, per_device_train_batch_size=2, learning_rate=0.01, save_strategy="no",
        report_to="none", disable_tqdm=True, optim="adamw_torch", use_cpu=kind() == "cpu", **ENGINES[engine],
    )  # fmt: skip
    with context():
        model = create(folder)
    notes = Notes()
    trainer = transformers.Trainer(model, arguments, train_dataset=texts(), callbacks=[notes])
    trainer.train()
    trainer.save_model(f"{folder}/saved")
    return notes.before, notes.after


def from_configuration(folder):
    return transformers.AutoModelForSequenceClassification.from_config(llama(), dtype=torch.bfloat16)


def from_checkpoint(folder):
    """Which lacks the head."""
    return transformers.LlamaForSequenceClassification.from_pretrained(
        f"{folder}/pretrained", num_labels=3, pad_token_id=0, dtype=torch.bfloat16
    )


def from_constructor(folder):
    """Which makes another model by from_config; without fastinit Transformers cannot do that under ZeRO-3."""
    return transformers.LlamaForSequenceClassification(llama())


def llama():
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=3, pad_token_id=0,
    )  # fmt: skip


# On the ranks


def run_script(script, with_fastinit, *arguments):
    join()
    torch.manual_seed(SEED + dist.get_rank())
    if with_fastinit:
        fastinit.lightning.enable()
    try:
        return tuple(digest(tensors) for tensors in script(*arguments))
    finally:
        fastinit.lightning.disable()


def run_transformers(engine, create, with_fastinit, shards, folder):
    join()
    transformers.trainer_utils.set_seed(SEED)

    def context():
        if not with_fastinit:
            return nullcontext()
        shard = fastinit.deepspeed.zero3(ENGINES[engine]["deepspeed"]) if shards else False
        return fastinit.on(kind(), "bf16", shard=shard)

    return [digest_of_each(tensors) for tensors in with_transformers(engine, create, context, folder)]


def digest_of_each(tensors):
    return {name: digest({name: tensor}) for name, tensor in tensors.items()}


# Tests


@pytest.fixture(scope="module")
def plain_ranks(new_ranks):
    yield from new_ranks()


def of_the_cpu(dtype):
    torch.manual_seed(SEED)
    with fastinit.on("cpu", dtype):
        return whole(Model(orthogonal=False))


def skip_without_deepspeed(name):
    if name.startswith(("DeepSpeed", "ZeRO")):
        pytest.importorskip("deepspeed")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("script", [with_trainer, with_fabric])
def test_lightning(ranks, script, name, precision, tmp_path):
    skip_without_deepspeed(name)
    one, other = ranks.run(run_script, script, True, name, precision, str(tmp_path / "saved"), world=2)
    expected = of_the_cpu(PRECISIONS[precision])
    if name.startswith("DeepSpeed") and precision == "bf16-mixed":
        # DeepSpeed keeps the weights in bf16 then, and its optimizer those of fp32; stage 2 leaves buffers in fp32.
        expected = of_the_cpu("bf16") | ({"table": expected["table"]} if name == "DeepSpeed 2" else {})
    if name == "FSDP1" and precision == "bf16-mixed":
        expected["table"] = expected["table"].bfloat16()  # FSDP1 casts buffers itself
    before, after, loaded = one
    assert before == digest(expected)
    assert after != before and loaded == after
    assert other == one


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("script", [with_trainer, with_fabric])
def test_lightning_without_fastinit(plain_ranks, script, name, tmp_path):
    skip_without_deepspeed(name)
    plain_ranks.run(run_script, script, False, name, "bf16-true", str(tmp_path / "saved"), world=2)


def save_pretrained(folder):
    with fastinit.on("cpu", "bf16", seed=SEED):
        transformers.LlamaModel(llama()).save_pretrained(folder / "pretrained")


@pytest.mark.parametrize("create", [from_configuration, from_constructor, from_checkpoint])
@pytest.mark.parametrize("engine", ENGINES)
def test_transformers(ranks, engine, create, tmp_path):
    expected, before = run_with_fastinit(ranks, engine, create, tmp_path, shards=engine == "ZeRO-3")
    assert before == expected


def test_zero3_of_transformers(ranks, tmp_path):
    """A checkpoint that is loaded into partitions which Transformers itself makes, in an ordinary block."""
    expected, before = run_with_fastinit(ranks, "ZeRO-3", from_checkpoint, tmp_path, shards=False)
    # Rank 0 writes what the checkpoint lacks into a weight that exists already. Transformers computes the buffers with
    # frequencies again, after its zero.Init has put them on the GPU, whose powers differ in last bits.
    different = {name for name in expected if before[name] != expected[name]}
    assert {name for name in different if not name.endswith("inv_freq")} == {"score.weight"}


def run_with_fastinit(ranks, engine, create, folder, shards):
    """Digests of the CPU's model, and of that on two ranks before the first step."""
    skip_without_deepspeed(engine)
    save_pretrained(folder)
    one, other = ranks.run(run_transformers, engine, create, True, shards, str(folder), world=2)
    transformers.trainer_utils.set_seed(SEED)
    with fastinit.on("cpu", "bf16"):
        expected = digest_of_each(whole(create(str(folder))))
    before, after = one
    assert list(before) == list(expected)
    assert after != before and other == one
    return expected, before


@pytest.mark.parametrize("create", [from_configuration, from_checkpoint])
@pytest.mark.parametrize("engine", ENGINES)
def test_transformers_without_fastinit(plain_ranks, engine, create, tmp_path):
    skip_without_deepspeed(engine)
    save_pretrained(tmp_path)
    plain_ranks.run(run_transformers, engine, create, False, False, str(tmp_path), world=2)
