"""What it takes to have a checkpoint's values in a model, by fastinit and others; `empty=True` beside the meta device.

Checkpoints are written first, so that they lie in the page cache; the clock runs from nothing to a model in bf16 whose
values are all there, and the growth of the host's memory meanwhile is noted:

- file: one safetensors file in bf16; index: the same in files of a quarter of the size at most;
- fp32: one in fp32, which is rounded on the way; torch: in bf16, as torch.save writes it.

Beside them stand two bounds: threads that read the files into pinned buffers and copy those to the device, with no
model and no names; and one copy from pinned memory, the link.

Ranks, one for each GPU (nccl) or two on the CPU (gloo), read one file at the same time: each its own part of a model
under FSDP2, or each the whole model; beside rank 0 as the only one that reads, whose tensors the others are sent. The
figure is of the slowest rank.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import peers
import pytest
import torch
import torch.distributed as dist

import fastinit
from fastinit.cli import measure, text
from fastinit.cli.models import LLAMA_7B, Decoder, DecoderConfig

KINDS = {"file": 32, "index": 8, "fp32": 8, "torch": 8}  # layers
BF16 = torch.bfloat16


def config_for(device, quick, layers):
    if quick or device.type == "cpu":
        return DecoderConfig(1000, 256 if quick else 1024, max(layers // 8, 1), 4, 1024)
    return LLAMA_7B.with_layers(layers)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, main_device, quick):
    """checkpoint(kind): a directory as `from_pretrained` wants it; the last one is deleted."""
    written = {}

    def checkpoint(kind):
        if kind not in written:
            for path in written.values():
                for file in path.iterdir():
                    file.unlink()
            written.clear()
            written[kind] = tmp_path_factory.mktemp(kind)
            write(kind, config_for(main_device, quick, KINDS[kind]), written[kind], main_device)
        return written[kind]

    return checkpoint


def write(kind, config, folder, device):
    with fastinit.on(device, "fp32" if kind == "fp32" else "bf16", seed=1):
        model = peers.llama(config, "transformers")()
    if kind == "torch":
        model.config.save_pretrained(folder)
        torch.save({key: tensor.cpu() for key, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")
    else:
        nbytes = sum(each.nbytes for each in model.parameters())
        model.save_pretrained(folder, max_shard_size=nbytes // 4 if kind == "index" else 2 * nbytes)


def weights(folder):
    return sorted(each for each in folder.iterdir() if each.suffix in (".safetensors", ".bin"))


def state_of(folder, device):
    """A state dict on a device, as people load it by hand."""
    from safetensors.torch import load_file

    state = {}
    for file in weights(folder):
        if file.suffix == ".bin":
            state |= torch.load(file, map_location=device, weights_only=True, mmap=True)
        else:
            state |= load_file(file, device=str(device))
    return state


def by_fastinit(build, folder, device):
    return fastinit.load(build, folder, device, "bf16", progress=False)


def by_from_pretrained(build, folder, device):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, device_map=str(device))


def in_a_block(load):
    def loaded(build, folder, device):
        with fastinit.on(device, "bf16"):
            return load(build, folder, device)

    return loaded


def built_and_loaded(build, folder, device):
    model = build()
    model.load_state_dict(state_of(folder, device))
    return model


def on_torch_device(build, folder, device):
    with measure.default_dtype(BF16), device:
        model = build()
    model.load_state_dict(state_of(folder, device))
    return model


def assigned(build, folder, device):
    with torch.device("meta"):
        model = build()
    model.load_state_dict(state_of(folder, device), assign=True)
    return model.to(BF16)


def threads_alone(build, folder, device, readers=16, nbytes=8 << 20):
    """What can be expected: every file into memory of the device, by threads that read and copy."""
    buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(readers)]
    targets = [torch.empty(file.stat().st_size, dtype=torch.uint8, device=device) for file in weights(folder)]
    for file, target in zip(weights(folder), targets, strict=True):
        descriptor = os.open(file, os.O_RDONLY)

        def work(number, target=target, descriptor=descriptor):
            buffer, view = buffers[number], buffers[number].numpy()
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            for offset in range(number * nbytes, len(target), readers * nbytes):
                count = os.preadv(descriptor, [view], offset)
                with torch.cuda.stream(stream):
                    target[offset : offset + count].copy_(buffer[:count], non_blocking=True)
                if stream is not None:
                    stream.synchronize()

        with ThreadPoolExecutor(readers) as pool:
            list(pool.map(work, range(readers)))
        os.close(descriptor)
    return targets


LOADS = {
    "fastinit": by_fastinit,
    "from_pretrained": by_from_pretrained,
    "the same in fastinit.on": in_a_block(by_from_pretrained),
    "meta, load_file, assign": assigned,
    "torch.device, load_state_dict": on_torch_device,
    "the latter in fastinit.on": in_a_block(built_and_loaded),
    "threads alone": threads_alone,
}


@pytest.mark.parametrize("way", LOADS)
@pytest.mark.parametrize("kind", KINDS)
def test_load(figure, main_device, quick, checkpoint, kind, way):
    grown = []

    def run():
        measure.clean_up(main_device)
        memory = measure.Memory(main_device)
        seconds, kept = measure.seconds_of(lambda: LOADS[way](build, folder, main_device), main_device)
        grown.append(memory.host_growth())
        del kept
        return seconds

    with figure(f"{kind}, {main_device}", way) as record:
        peers.require("safetensors", "accelerate" if "from_pretrained" in (way, kind) else None)
        build, folder = peers.llama(config_for(main_device, quick, KINDS[kind]), "transformers"), checkpoint(kind)
        size = sum(file.stat().st_size for file in weights(folder))
        record(run, rounds=3, patience=8.0, bytes=size).update(host_growth=grown[-1])


def test_link(figure, main_device, quick):
    pinned = main_device.type == "cuda"
    source = torch.empty(1 << (20 if quick else 30), dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty_like(source, device=main_device)

    def run():
        return measure.seconds_of(lambda: target.copy_(source, non_blocking=True), main_device)[0]

    with figure(f"link, {main_device}", "one copy from pinned memory") as record:
        record(run, rounds=3, bytes=source.nbytes)


# Ranks


@pytest.fixture(scope="module")
def decoder_file(tmp_path_factory, main_device, quick):
    """A configuration, and a file with a model of it in bf16."""
    from safetensors.torch import save_file

    small = DecoderConfig.of_size(1_000_000 if quick else 100_000_000)
    config = LLAMA_7B if main_device.type == "cuda" and not quick else small
    with fastinit.on(main_device, "bf16", seed=1):
        model = Decoder(config)
    path = tmp_path_factory.mktemp("ranks") / "model.safetensors"
    save_file({name: tensor.cpu() for name, tensor in model.state_dict().items()}, path, {"format": "pt"})
    del model
    yield config, path
    path.unlink()


def sharded(config, device):
    """A model under FSDP2 that has memory and no values."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    with fastinit.on(device, "bf16", shard=True, seed=2):
        model = Decoder(config)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fastinit.materialize(model, empty=True)
    return model


def each_reads_its_part(config, path, device):
    return fastinit.load(sharded(config, device), path, progress=False)


def each_reads_the_whole(config, path, device):
    return by_fastinit(lambda: Decoder(config), path, device)


def rank_0_broadcasts(config, path, device):
    if dist.get_rank() == 0:
        model = each_reads_the_whole(config, path, device)
    else:
        with fastinit.on(device, "bf16", empty="unchecked"):
            model = Decoder(config)
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    return model


@torch.no_grad()
def rank_0_scatters(config, path, device):
    """Each tensor whole to every rank, which keeps its rows: what torch's own loading from rank 0 does."""
    model = sharded(config, device)
    state = each_reads_the_whole(config, path, device).state_dict() if dist.get_rank() == 0 else {}
    for name, tensor in model.state_dict().items():
        whole = state[name] if name in state else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        dist.broadcast(whole, 0)
        rows = whole.chunk(dist.get_world_size())
        if dist.get_rank() < len(rows):
            tensor.to_local().copy_(rows[dist.get_rank()])
    return model


RANK_WAYS = {
    "FSDP2": {"fastinit": each_reads_its_part, "rank 0 reads, broadcast": rank_0_scatters},
    "whole": {"fastinit": each_reads_the_whole, "rank 0 reads, broadcast": rank_0_broadcasts},
}


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind, ways in RANK_WAYS.items() for way in ways])
def test_ranks(figure, main_device, quick, decoder_file, kind, way):
    config, path = decoder_file
    ranks = torch.cuda.device_count() if main_device.type == "cuda" else 2
    with figure(f"{kind}, {text.count(config.parameters)}, {ranks} ranks, {main_device.type}", way) as record:
        if ranks == 1:
            raise peers.Unavailable("unsupported: 1 rank is too few")
        job = (RANK_WAYS[kind][way], config, path, 1 if quick else 3)
        of_ranks = measure.on_ranks(run_rank, ranks, main_device.type, *job)
        record([max(each) for each in zip(*of_ranks, strict=True)][1:], bytes=path.stat().st_size)


def run_rank(device, way, config, path, rounds):
    """Seconds of each round on a rank, the first of which imports."""
    seconds = []
    for _ in range(1 + rounds):
        measure.clean_up(device)
        dist.barrier()
        taken, model = measure.seconds_of(lambda: way(config, path, device), device)
        seconds.append(taken)
        check_corners(model, path)
        del model
    return seconds


def check_corners(model, path):
    """Raise RuntimeError unless the first value that this rank has of each tensor is what the file says."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name, tensor in model.state_dict().items():
            row, local = 0, tensor
            if hasattr(tensor, "to_local"):
                local = tensor.to_local()
                row = dist.get_rank() * -(-len(tensor) // dist.get_world_size())
            if len(local) and not torch.equal(local[0].cpu(), file.get_slice(name)[row : row + 1][0]):
                raise RuntimeError(f"{name} has been read wrong")


EMPTY_WAYS = {"empty=True": True, 'empty="unchecked"': "unchecked", "fastinit": False, "meta": None}


@pytest.mark.parametrize("way", EMPTY_WAYS)
def test_empty(figure, main_device, quick, way):
    """The constructor alone, from an empty allocator cache."""
    config = config_for(main_device, quick, 32)

    def create():
        if way == "meta":
            with measure.default_dtype(BF16), torch.device("meta"):
                return Decoder(config)
        with fastinit.on(main_device, "bf16", seed=1, empty=EMPTY_WAYS[way]):
            return Decoder(config)

    with figure(f"constructor, {text.count(config.parameters)}, {main_device}", way) as record:
        record(from_an_empty_cache(create, main_device), rounds=9)


@pytest.mark.parametrize("way", ["fastinit", "empty=True, then load"])
def test_load_state_dict(figure, main_device, quick, way):
    """Constructor and a full load in the block, where no fill is executed, beside `empty=True` and the load behind it.
    The state dict lies on the device, so that the copies take the least time that they can."""
    config = config_for(main_device, quick, 32)
    with fastinit.on(main_device, "bf16", seed=1):
        state = Decoder(config).state_dict()
    executed = []

    def inside():
        with fastinit.on(main_device, "bf16", seed=2) as report:
            model = Decoder(config)
            model.load_state_dict(state)
        executed.append(report.fills_executed)
        return model

    def behind():
        with fastinit.on(main_device, "bf16", seed=2, empty=True) as report:
            model = Decoder(config)
        model.load_state_dict(state)
        executed.append(report.fills_executed)
        return model

    run = from_an_empty_cache(inside if way == "fastinit" else behind, main_device)
    with figure(f"load_state_dict, {text.count(config.parameters)}, {main_device}", way) as record:
        record(run, rounds=9).update(fills_executed=max(executed))


def from_an_empty_cache(create, device):
    def run():
        measure.clean_up(device)
        return measure.seconds_of(create, device)[0]

    return run
