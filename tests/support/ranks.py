"""Ranks for the tests of sharded models: processes on this machine, or threads whose collectives do nothing.

`Ranks` are processes with gloo, or with NCCL and a GPU each. They stay for many tests, because importing torch takes
seconds, and form a new process group for each function that they are given, of as many ranks as it asks for. They
cannot hang a test: what takes too long is killed, and fails it.

`on_every_rank` runs the ranks of a mesh one after the other in this process, on a process group that communicates
nothing: a hundred meshes take a second.
"""

import datetime
import importlib
import math
import multiprocessing
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist
from hypothesis import settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

SECONDS = 120  # for a function to run in all ranks
TIMEOUT = 60  # seconds of a collective


def read_bytes():
    """How many bytes this process has read from files so far, mapped ones apart. Needs Linux's /proc."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


class Ranks:
    """Processes that wait for functions to run; started when they are needed, and anew after some were killed."""

    def __init__(self, most, directories, backend="gloo", timeout=TIMEOUT):
        self._most, self._directories, self._backend, self._timeout = most, directories, backend, timeout
        self._processes, self._pipes, self._stores = [], [], 0

    def run(self, function, *args, world, joined=True):
        """What function(*args) returns on each of so many ranks, in a process group of theirs.

        With joined=False there is no group yet: the function is given the arguments of init_process_group first.
        """
        # Not as long as a collective waits: of a rank that has failed, the others need not say that it did not come.
        outcomes = self.outcomes(function, *args, world=world, joined=joined, patience=5)
        errors = [f"rank {rank} of {world}: {error}" for rank, (error, _) in enumerate(outcomes) if error is not None]
        assert not errors, "\n".join(errors)
        return [result for _, result in outcomes]

    def outcomes(self, function, *args, world, joined=True, patience=SECONDS):
        """The same as (error or None, result) of each rank; a rank may raise, or end its process.

        The others have so many seconds after that.
        """
        if not self._processes:
            self._start()
        self._stores += 1
        for rank in range(world):
            group = {"init_method": f"file://{self._directory}/{self._stores}", "rank": rank, "world_size": world}
            group |= {"backend": self._backend, "timeout": datetime.timedelta(seconds=self._timeout)}
            self._pipes[rank].send((function, args, group, joined))
        deadline = time.monotonic() + SECONDS
        outcomes = [("no answer in time", None)] * world
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes[:world])}
        while waiting and (ready := connection.wait(waiting, max(deadline - time.monotonic(), 0))):
            for pipe in ready:
                try:
                    outcome = pipe.recv()
                except EOFError:
                    outcome = "the process has ended", None
                if outcome[0] is not None:
                    deadline = min(deadline, time.monotonic() + patience)
                outcomes[waiting.pop(pipe)] = outcome
        if any(error for error, _ in outcomes):
            self.end()  # whoever waits for the one that failed
        return outcomes

    def _start(self):
        if self._backend == "nccl":
            context = multiprocessing.get_context("spawn")  # no process can use CUDA that was forked from one that has
        else:
            # Its server imports torch once and is forked for each rank, before any of it computes.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel"])
        self._directory = self._directories.mktemp("ranks")
        for rank in range(self._most):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self._backend), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def end(self):
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)  # by itself, so that its coverage is kept, if it does not wait for another rank
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(pipe, rank, backend):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    while True:
        try:
            function, args, group, joined = pipe.recv()
        except EOFError:
            return
        try:
            if joined:
                dist.init_process_group(**group)
                dist.barrier()  # a rank that is done early must not close connections that others still make
            result = function(*args) if joined else function(group, *args)
            pipe.send((None, result))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def launched():
    """Let frameworks take this rank, which has its process group, for a process that torchrun has started."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "0"}  # nobody connects


def launched_by_deepspeed():
    """The same for DeepSpeed, which keeps much of an earlier process group."""
    launched()
    if dist.get_backend() == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    # It would compile an all-reduce through shared memory on the CPU, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.comm.cdb = None
    importlib.reload(deepspeed.utils.groups)


def on_every_rank(world, function):
    """What function(rank) returns on each rank of a process group whose collectives do nothing.

    Each rank has a thread of its own, one at a time: torch keeps what it knows of a mesh, the rank included, by thread.
    """

    def run(rank):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            return function(rank)
        finally:
            dist.destroy_process_group()

    results = []
    for rank in range(world):
        with ThreadPoolExecutor(1) as thread:
            results.append(thread.submit(run, rank).result())
    return results


def cases(count):
    return settings(derandomize=True, deadline=None, max_examples=count)


@st.composite
def distributions(draw):
    """A shape, a mesh of 1 to 3 axes and a placement on each, some of them those of FSDP2 over tensor parallelism."""
    shape = draw(st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple))
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda sizes: math.prod(sizes) <= 8))
    dims = st.integers(0, len(shape) - 1)
    placements = [draw(st.one_of(st.just(Replicate()), dims.map(Shard), dims.map(Shard))) for _ in mesh]
    dim = draw(dims)
    axes = [axis for axis, placement in enumerate(placements) if placement == Shard(dim)]
    if len(axes) > 1 and shape[dim] % math.prod(mesh[axis] for axis in axes) == 0 and draw(st.booleans()):
        placements[axes[-2]] = _StridedShard(dim, split_factor=mesh[axes[-1]])
    return shape, tuple(mesh), placements
