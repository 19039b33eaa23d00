"""The pipeline behind `fastinit.load`, against plain reads: sizes, places and dtypes, and what fails on the way."""

import os
import random
import threading
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import fastinit
from fastinit import load
from fastinit.checkpoint import loading, streaming
from fastinit.checkpoint.files import Checkpoint
from fastinit.checkpoint.streaming import StoredFile, Transfer, stream

CHUNK = streaming._CHUNK_BYTES
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8]
DTYPES += [torch.complex64, torch.float8_e4m3fn]


@pytest.fixture
def file(tmp_path):
    """20 MiB of random bytes."""
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(20 << 20))
    return path


def expected(path, offset, dtype, count):
    content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    return content[offset : offset + count * dtype.itemsize].clone().view(dtype)


def assert_same_bits(tensor, values):
    """Fail unless a tensor has these values, rounded once; where torch converts a NaN, its payload is left to it."""
    tensor, values = (each.contiguous().flatten() for each in (tensor, values))
    rounded = values.to(tensor.dtype)
    if values.dtype != tensor.dtype:
        assert torch.equal(tensor.isnan(), rounded.isnan())
        tensor, rounded = (torch.where(each.isnan(), 0, each) for each in (tensor, rounded))
    assert torch.equal(tensor.view(torch.uint8), rounded.view(torch.uint8))


@pytest.mark.parametrize("count", [1, 1000, CHUNK // 4 - 1, CHUNK // 4, CHUNK // 4 + 1, 2 * CHUNK // 4 + 77])
@pytest.mark.parametrize("offset", [0, 1, 4095, 12345])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_range_of_a_file_is_read_and_rounded_once(file, count, offset, dtype):
    target = torch.empty(count, dtype=dtype)
    stream([Transfer(StoredFile.at(file), offset, torch.float32, target)])
    assert_same_bits(target, expected(file, offset, torch.float32, count))


@pytest.mark.parametrize("converts", [False, True])
def test_tensors_of_all_dtypes_that_lie_side_by_side_are_read_together_or_not(file, converts):
    """Random sizes, gaps and dtypes: aligned or not, small and beyond a chunk."""
    choose = random.Random(5)
    transfers, offset = [], 0
    while True:
        dtype = choose.choice(DTYPES)
        count = choose.choice([0, 1, 3, 17, 256, 5000, choose.randrange(600_000)])
        offset += choose.choice([0, 0, 1, 8, 64, 100_000])
        if offset + count * dtype.itemsize > file.stat().st_size:
            break
        wider = {torch.float32: torch.float64, torch.float16: torch.float32, torch.int8: torch.int32}
        target = torch.empty(count, dtype=wider.get(dtype, dtype) if converts else dtype)
        transfers.append(Transfer(StoredFile.at(file), offset, dtype, target))
        offset += count * dtype.itemsize
    assert len(transfers) > 50
    advanced = []
    stream(transfers, advanced.append)
    for each in transfers:
        assert_same_bits(each.target, expected(file, each.offset, each.dtype, each.target.numel()))
    assert sum(advanced) == sum(each.target.numel() * each.dtype.itemsize for each in transfers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "length", "stride"),
    [(1000, 300, 2000), (3, 1, 4), (1, 7, 28), (700, 4096, 20_000), (2, CHUNK // 4 + 5, CHUNK + 80), (5, 0, 100)],
)
def test_rows_of_a_file_lie_side_by_side_in_memory(file, dtype, rows, length, stride):
    """Of fewer and of more bytes than a chunk, within others that are read whole."""
    target, before, after = torch.empty(rows, length, dtype=dtype), torch.empty(5), torch.empty(7)
    last = 1000 + rows * stride
    stream(
        [
            Transfer(StoredFile.at(file), 980, torch.float32, before),
            Transfer(StoredFile.at(file), 1000, torch.float32, target, stride),
            Transfer(StoredFile.at(file), last, torch.float32, after),
        ]
    )
    in_the_file = expected(file, 1000, torch.uint8, rows * stride).view(rows, stride)[:, : length * 4]
    assert_same_bits(target, in_the_file.contiguous().view(torch.float32))
    assert_same_bits(before, expected(file, 980, torch.float32, 5))
    assert_same_bits(after, expected(file, last, torch.float32, 7))


@pytest.mark.parametrize("stride", [0, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "length", "width"), [(1000, 300, 700), (3, 1, 4), (2, CHUNK // 4 + 5, CHUNK)])
def test_rows_need_not_lie_side_by_side_in_memory(file, dtype, rows, length, width, stride):
    stride = stride and max(stride, length * 4)
    memory = torch.full((rows, width), -1.0, dtype=dtype)
    target, beside = memory[:, :length], torch.empty(9)
    bytes_between = stride or length * 4
    after = 8 + rows * bytes_between
    stream(
        [
            Transfer(StoredFile.at(file), 8, torch.float32, target, stride),
            Transfer(StoredFile.at(file), after, torch.float32, beside),
        ]
    )
    in_the_file = expected(file, 8, torch.uint8, rows * bytes_between).view(rows, -1)[:, : length * 4]
    assert_same_bits(target, in_the_file.contiguous().view(torch.float32))
    assert_same_bits(beside, expected(file, after, torch.float32, 9))
    assert (memory[:, length:] == -1).all()


def test_a_file_that_ends_within_rows_is_an_error(file):
    os.truncate(file, 100_050)
    with pytest.raises(OSError, match="ends at byte 100050 while it is being read"):
        stream([Transfer(StoredFile.at(file), 0, torch.float32, torch.empty(101, 25), 1000)])


def test_one_stored_tensor_may_go_to_two_places(file):
    targets = [torch.empty(300, 5) for _ in range(2)]
    stream([Transfer(StoredFile.at(file), 64, torch.float32, target) for target in targets])
    for target in targets:
        assert_same_bits(target, expected(file, 64, torch.float32, 1500))


def test_a_target_changes_only_where_it_is_asked_to_and_its_version_says_so(file):
    memory = torch.full((3, 1000), 7.0)
    leaf = torch.nn.Parameter(torch.zeros(1000))
    versions = memory._version, leaf._version
    stream(
        [
            Transfer(StoredFile.at(file), 0, torch.float32, memory[1]),
            Transfer(StoredFile.at(file), 4000, torch.float16, leaf),
        ]
    )
    assert (memory[0] == 7).all() and (memory[2] == 7).all()
    assert_same_bits(memory[1], expected(file, 0, torch.float32, 1000))
    assert memory._version > versions[0] and leaf._version > versions[1] and leaf.grad_fn is None


def test_no_mode_around_it_has_a_say(file):
    target = torch.empty(1000, dtype=torch.float64)
    with torch.device("meta"), torch.inference_mode():
        stream([Transfer(StoredFile.at(file), 0, torch.float32, target)])
    assert_same_bits(target, expected(file, 0, torch.float32, 1000))


# What fails ---------------------------------------------------------------------------------------------------------


def no_reader_is_left():
    return not any(thread.name.startswith("fastinit.load") for thread in threading.enumerate())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_has_changed_is_an_error(file, tmp_path, dtype):
    transfer = Transfer(StoredFile.at(file), 0, torch.float32, torch.empty(300_000, dtype=dtype))
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(OSError, match="has changed since its metadata was read"):
        stream([transfer])
    os.truncate(file, 1000)
    with pytest.raises(OSError, match="has changed since its metadata was read"):
        stream([transfer])
    with pytest.raises(OSError, match="ends at byte 1000 while it is being read"):
        stream([transfer._replace(file=StoredFile.at(file))])
    file.unlink()
    with pytest.raises(FileNotFoundError):
        stream([transfer])
    assert no_reader_is_left()


def test_a_file_that_shrinks_while_it_is_read_is_an_error(file, monkeypatch):
    """Truncated by the first reader, when it has found it unchanged."""
    check = StoredFile.check

    def truncates(self, *args):
        check(self, *args)
        os.truncate(file, 5 << 20)

    monkeypatch.setattr(StoredFile, "check", truncates)
    with pytest.raises(OSError, match=r"has changed|ends at byte 5242880"):
        stream([Transfer(StoredFile.at(file), 0, torch.float32, torch.empty(5 << 20))])
    assert no_reader_is_left()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_interrupts_it_leaves_no_thread_that_writes(file, monkeypatch, error):
    """Each reader finishes the chunk that it has, and takes no other."""
    reading, go_on, check = threading.Semaphore(0), threading.Event(), StoredFile.check

    def waits(self, *args):
        reading.release()
        go_on.wait(60)
        check(self, *args)

    def interrupted(*args):
        for _ in range(streaming._READERS):
            reading.acquire(timeout=60)
        threading.Timer(0.2, go_on.set).start()
        raise error

    monkeypatch.setattr(StoredFile, "check", waits)
    monkeypatch.setattr(streaming, "wait", interrupted)
    targets = [torch.zeros(CHUNK // 4) for _ in range(streaming._READERS + 5)]
    with pytest.raises(error):
        stream([Transfer(StoredFile.at(file), 0, torch.float32, target) for target in targets])
    assert no_reader_is_left()
    assert sum(bool(target.any()) for target in targets) == streaming._READERS


def test_an_error_of_the_bar_stops_it(file):
    def advance(count):
        raise ValueError("no bar")

    with pytest.raises(ValueError, match="no bar"):
        stream([Transfer(StoredFile.at(file), 0, torch.float32, torch.empty(1000))], advance)
    assert no_reader_is_left()


# Where tensors lie in files ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch 2.8 has them")
def test_two_numbers_of_four_bits_are_one_element(tmp_path):
    """As in torch, whatever the header of the file counts."""
    packed = torch.arange(32, dtype=torch.uint8).view(4, 8).view(torch.float4_e2m1fn_x2)
    save_file({"packed": packed, "other": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path / "model.safetensors")
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"packed": (4, 8), "other": (3,)}
    assert torch.equal(checkpoint.read("packed").view(torch.uint8), packed.view(torch.uint8))


def stored():
    return {
        "odd": torch.arange(3, dtype=torch.uint8),
        "first": torch.randn(7, 5),
        "half": torch.randn(1000, 30).bfloat16(),
        "transposed": torch.randn(4, 6).t(),
        "part": torch.randn(10, 4)[3:5],
        "empty": torch.empty(0, 3),
        "number": torch.tensor(3),
    }


def assert_in_place(path, expected, streamed):
    """Fail unless a checkpoint says of these tensors, and no others, where they lie, and is right."""
    found = Checkpoint(path)
    parts = {name: found.parts(name) for name in found.tensors}
    assert {name for name in parts if parts[name]} == streamed
    for name in streamed:
        ((file, offset, box),) = parts[name]
        assert box.rows == (1, *[expected[name].numel()] * 3)
        content = file.path.read_bytes()[offset : offset + expected[name].nbytes]
        assert content == bytes(expected[name].contiguous().flatten().view(torch.uint8).tolist())


def test_tensors_of_a_safetensors_file_lie_where_its_header_says(tmp_path):
    state = {name: tensor.contiguous() for name, tensor in stored().items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert_in_place(tmp_path / "model.safetensors", state, set(state))


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "optimizer": torch.ones(9)}])
def test_tensors_of_a_torch_file_are_found_if_they_lie_in_order(tmp_path, wrap):
    state = stored()
    torch.save(wrap(state), tmp_path / "model.pt")
    assert_in_place(tmp_path / "model.pt", state, state.keys() - {"transposed", "empty"})


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_tensors_of_a_distributed_checkpoint_are_found_if_they_lie_in_order(tmp_path):
    state = stored()
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    assert_in_place(tmp_path / "dcp", state, state.keys() - {"transposed"})


def test_a_torch_file_of_another_byte_order_is_not_streamed(tmp_path):
    state = {"a": torch.tensor([1.5, 2.0]), "b": torch.arange(5)}
    torch.save(state, tmp_path / "model.pt")
    # Written again as a machine of the other order would have written it.
    with zipfile.ZipFile(tmp_path / "model.pt") as old, zipfile.ZipFile(tmp_path / "swapped.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("byteorder"):
                content = {b"little": b"big", b"big": b"little"}[content]
            elif "/data/" in name:
                size = 4 if len(content) == 8 else 8
                content = b"".join(content[at : at + size][::-1] for at in range(0, len(content), size))
            new.writestr(name, content)
    assert_in_place(tmp_path / "swapped.pt", state, set())
    loaded = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(tensor), False) for name, tensor in state.items()})
    load(loaded, tmp_path / "swapped.pt", progress=False)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_what_a_file_has_beside_its_tensors_does_not_mislead(tmp_path):
    """A record that nothing refers to lies before the others, at the distance that they have from each other."""
    state = {name: torch.full((32,), float(number)) for number, name in enumerate("abc")}
    torch.save(state, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as old, zipfile.ZipFile(tmp_path / "more.pt", "w") as new:
        prefix = old.namelist()[0].partition("/")[0]
        new.writestr(f"{prefix}/data/9", bytes(128))
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_in_place(tmp_path / "more.pt", state, set(state))


# Into placeholders ---------------------------------------------------------------------------------------------------


def layers():
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 30))
    model[1].weight = nn.Parameter(model[1].weight[:, :200])  # a view, as some constructors make them
    return model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_load_inside_of_a_block_streams_into_new_memory(tmp_path, dtype):
    with fastinit.on("cpu", "fp32", seed=1):
        state = {name: tensor.contiguous() for name, tensor in layers().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with fastinit.on("cpu", dtype, seed=2) as init:
        model = layers()
        load(model, tmp_path / "model.safetensors", progress=False)
        assert type(model[0].weight) is not nn.Parameter  # until the block ends
    assert init.fills_executed == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    assert type(model[0].weight) is nn.Parameter and model[0].weight.requires_grad


def test_a_load_inside_of_a_block_that_fails_leaves_what_is_recorded(tmp_path, monkeypatch):
    with fastinit.on("cpu", "bf16", seed=2):
        expected = layers()
    save_file(
        {name: tensor.contiguous() for name, tensor in expected.float().state_dict().items()},
        tmp_path / "x.safetensors",
    )
    monkeypatch.setattr(StoredFile, "check", lambda *args: os.stat(tmp_path / "gone"))
    with fastinit.on("cpu", "bf16", seed=2):
        model = layers()
        with pytest.raises(fastinit.CheckpointError, match="could not be read"):
            load(model, tmp_path / "x.safetensors", progress=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name].bfloat16()), name


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "dcp"])
def test_all_of_a_model_that_is_created_here_is_streamed(tmp_path, monkeypatch, name):
    state = {key: tensor.contiguous() for key, tensor in layers().state_dict().items()}
    path = tmp_path / name
    if name == "dcp":
        dcp.save(state, checkpoint_id=path)
    else:
        {"model.safetensors": save_file, "model.pt": torch.save}[name](state, path)
    streamed = []

    def noted(transfers, advance):
        streamed.extend(transfers)
        stream(transfers, advance)

    monkeypatch.setattr(loading, "stream", noted)
    model = load(layers, path, "cpu", "bf16", progress=False)
    assert sum(each.target.numel() for each in streamed) == sum(tensor.numel() for tensor in state.values())
    assert all(torch.equal(model.state_dict()[key], tensor.bfloat16()) for key, tensor in state.items())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
