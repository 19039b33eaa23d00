"""Parts of tensors filled from the recipe of the whole: boxes and their composition, DTensor shards and flat slices.

What is expected comes from elsewhere each time: the elements of a composition from two dictionaries, the values of a
recipe from whole streams that are copied to their places one after the other, the rows of a shard from torch, which
distributes (`distribute_tensor`, `fully_shard`) a tensor that holds its own indices. The ranks of a mesh run one after
the other in this process, on a process group that communicates nothing.
"""

import math
import subprocess
import sys
from itertools import chain, product

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from models import HALVES, SEED, bits, same_bits
from ranks import cases, distributions, on_every_rank
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard

from fastinit import native
from fastinit.execution import Fills
from fastinit.layout import Box, Window, compose, contiguous_strides, flat_box, nested_parts, numel, with_dims
from fastinit.native import (
    ADD,
    CLAMP,
    CONSTANT,
    DIVIDE,
    ERFINV,
    MAX_STEPS,
    MULTIPLY,
    NORMAL,
    TRUNCATED_NORMAL,
    UNIFORM,
)
from fastinit.recipe import Region, Write, with_step
from fastinit.sharding import Cut, local_boxes, shard_runs

CPU = torch.device("cpu")
UNTOUCHED = -3.0
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


# --- Boxes ------------------------------------------------------------------------------------------------------------


def places(box):
    """The box spelled out: memory place by sequence element; fails if an element has two places."""
    found = {}
    for at in product(*map(range, box.sizes)):
        index = box.index_offset + sum(m * stride for m, stride in zip(at, box.index_strides, strict=True))
        assert index not in found
        found[index] = box.memory_offset + sum(m * stride for m, stride in zip(at, box.memory_strides, strict=True))
    return found


def chained(first, second):
    """What the composition of two boxes has to place, element by element."""
    first, second = places(first), places(second)
    return {index: second[place] for index, place in first.items() if place in second}


def all_places(boxes):
    """The places of several boxes; fails if they are not disjoint."""
    found = {}
    for box in boxes:
        part = places(box)
        assert not found.keys() & part.keys()
        found |= part
    return found


@st.composite
def nested_strides(draw):
    """Sizes, and strides that leave every element a place of its own, in any order and with gaps."""
    dims, span = [], 0
    for _ in range(draw(st.integers(0, 4))):
        size = draw(st.integers(1, 5))
        stride = span + 1 + draw(st.sampled_from([0, 0, 0, 1, 2, 5]))
        dims.append((size, stride))
        span += (size - 1) * stride
    dims = draw(st.permutations(dims))
    return tuple(size for size, _ in dims), tuple(stride for _, stride in dims)


@st.composite
def rectangles(draw, shape):
    start = [draw(st.integers(0, size - 1)) for size in shape]
    return start, [draw(st.integers(1, size - first)) for size, first in zip(shape, start, strict=True)]


def placed_in_tensor(shape, start, sizes):
    """The box of a stream whose memory is the rectangle of a tensor."""
    offset = Window(shape, tuple(start)).index_offset
    return Box(0, tuple(sizes), contiguous_strides(sizes), offset, contiguous_strides(shape))


@cases(800)
@given(nested_strides(), nested_strides(), st.integers(0, 40), st.integers(0, 60))
def test_a_composition_places_what_both_boxes_have_and_nothing_twice(one, other, offset, begin):
    first = Box(7, one[0], contiguous_strides(one[0]), offset, one[1])
    second = Box(begin, other[0], other[1], 3, contiguous_strides(other[0]))
    assert all_places(compose(first, second)) == chained(first, second)


@cases(500)
@given(st.data(), st.lists(st.integers(1, 5), max_size=4).map(tuple))
def test_rectangles_of_one_tensor_meet_in_one_box(data, shape):
    first = placed_in_tensor(shape, *data.draw(rectangles(shape)))
    start, sizes = data.draw(rectangles(shape))
    second = Window(shape, tuple(start)).box(sizes, contiguous_strides(sizes))
    common = compose(first, second)
    assert len(common) <= 1
    assert all_places(common) == chained(first, second)


@cases(500)
@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
def test_a_flat_slice_meets_a_rectangle_of_n_dimensions_in_at_most_2n_minus_1_boxes(data, shape):
    first = placed_in_tensor(shape, *data.draw(rectangles(shape)))
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, numel(shape))] * 2)))
    common = compose(first, flat_box(begin, end))
    assert len(common) <= 2 * len(shape) - 1
    assert all_places(common) == chained(first, flat_box(begin, end))


def test_large_boxes_are_composed_without_a_look_at_their_elements():
    rows, columns = 1 << 40, 1 << 20
    every_third_row = Box(0, (rows // 3, columns), (columns, 1), 0, (3 * columns, 1))
    tail_of_each = Window((rows, columns), (0, columns - 8)).box((rows, 8), (8, 1))
    assert compose(every_third_row, tail_of_each) == [
        Box(columns - 8, (rows // 3, 8), (columns, 1), 0, (24, 1)),
    ]


@cases(300)
@given(st.lists(st.integers(1, 4), max_size=4).map(tuple), st.data())
def test_the_parts_of_a_box_come_in_the_order_of_its_indices_and_share_no_place_in_themselves(sizes, data):
    strides = tuple(data.draw(st.integers(1, 6)) for _ in sizes)
    box = Box(2, sizes, contiguous_strides(sizes), 5, strides)
    parts = list(nested_parts(box))
    assert list(all_places(parts).items()) == list(places(box).items())
    assert all(len(set(places(part).values())) == numel(part.sizes) for part in parts)
    for most in (1, 2):
        split = list(with_dims(box, most))
        assert all_places(split) == places(box)
        assert all(len(part.sizes) <= most for part in split)


def test_a_window_that_does_not_fit_has_no_box():
    with pytest.raises(
        ValueError, match=r"shape \(3, 2\) at start=\(2, 0\) does not fit into the global shape \(4, 2\)"
    ):
        Window((4, 2), (2, 0)).box((3, 2), (2, 1))


# --- Recipes ----------------------------------------------------------------------------------------------------------

STEPS = {
    CONSTANT: [()],
    UNIFORM: [
        (),
        ((MULTIPLY, 3.0, 0.0), (CLAMP, 0.5, 2.5)),
        ((ERFINV, 0.0, 0.0), (MULTIPLY, 0.02, 0.0)),
        ((MULTIPLY, 0.5, 0.0), (ADD, -0.4, 0.0), (ERFINV, 0.0, 0.0), (MULTIPLY, -2.0, 0.0), (CLAMP, -1.0, 1.5)),
    ],
    NORMAL: [(), ((DIVIDE, 3.0, 0.0), (ADD, 0.1, 0.0))],
    TRUNCATED_NORMAL: [()],
}
PARAMETERS = {
    CONSTANT: [(0.0,), (-0.0,), (0.3,)],
    UNIFORM: [(-0.9, 0.9)],
    NORMAL: [(0.0, 0.02), (1.0, 2.0)],
    TRUNCATED_NORMAL: [(0.0, 1.0, -2.0, 2.0), (0.5, 0.1, 0.6, 3.0)],
}


@st.composite
def regions(draw, shape):
    """The region of a view: slices with steps, transpositions, and now and then a diagonal or what overlaps itself."""
    view = torch.empty(shape)
    for dim in range(view.dim()):
        first = draw(st.integers(0, view.size(dim) - 1))
        last = draw(st.integers(first + 1, view.size(dim)))
        if draw(st.booleans()):
            view = view[(slice(None),) * dim + (slice(first, last, draw(st.integers(1, 3))),)]
    view = view.permute(draw(st.permutations(range(view.dim()))))
    special = draw(st.sampled_from(["", "", "", "select", "diagonal", "unfold", "strided"]))
    if special == "select" and view.dim():
        view = view.select(0, draw(st.integers(0, view.size(0) - 1)))
    if special == "diagonal" and view.dim() > 1:
        view = view.diagonal()
    if special == "unfold" and view.dim():
        view = view.unfold(-1, draw(st.integers(1, view.size(-1))), draw(st.integers(1, 2)))
    if special == "strided":
        sizes, strides, room = [], [], numel(shape) - 1
        for stride in draw(st.lists(st.integers(1, 7), max_size=3)):
            sizes.append(draw(st.integers(1, min(room // stride, 4) + 1)))
            strides.append(stride)
            room -= (sizes[-1] - 1) * stride
        view = torch.empty(shape).as_strided(sizes, strides, draw(st.integers(0, room)))
    return Region(view.storage_offset(), tuple(view.shape), view.stride())


@st.composite
def recipes(draw, shape):
    writes = []
    for stream in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(list(PARAMETERS)))
        region = draw(regions(shape)) if writes or draw(st.booleans()) else None
        parameters, steps = draw(st.sampled_from(PARAMETERS[kind])), draw(st.sampled_from(STEPS[kind]))
        writes.append(Write(kind, parameters, stream, steps, region))
    return tuple(writes)


def expected(shape, dtype, recipe):
    """The whole tensor: each write's stream by itself, whose elements are then put in their places one by one."""
    whole = torch.zeros(numel(shape), dtype=dtype)
    for write in recipe:
        region = write.region or Region(0, (numel(shape),), (1,))
        stream = torch.empty(numel(region.sizes), dtype=dtype)
        fills = Fills(SEED, CPU)
        fills.add(stream.data_ptr(), stream.numel(), dtype, (write._replace(region=None),))
        fills.run()
        at = torch.arange(whole.numel()).as_strided(region.sizes, region.strides, region.offset).flatten()
        bits(whole).numpy()[at.numpy()] = bits(stream).numpy()  # of equal indices the last one counts
    return whole.view(shape)


def filled(local, recipe, boxes):
    fills = Fills(SEED, CPU)
    fills.add_part(local.data_ptr(), local.dtype, recipe, boxes)
    fills.run()
    return local


def test_a_recipe_takes_as_many_steps_as_a_fill_and_keeps_those_before_erfinv():
    steps = ((MULTIPLY, 2.0, 0.0), (ADD, -1.0, 0.0), (ERFINV, 0.0, 0.0), (MULTIPLY, 0.02, 0.0), (CLAMP, -0.04, 0.04))
    for kind, parameters in ((UNIFORM, (0.0, 1.0)), (NORMAL, (0.0, 1.0)), (CONSTANT, (0.3,))):
        recipe = (Write(kind, parameters, 3), Write(CONSTANT, (0.0,), region=Region(0, (1,), (1,))))
        for step in steps:
            recipe = with_step(recipe, *step)
        assert [write.steps for write in recipe] == [steps, steps]
        assert [write.parameters for write in recipe] == [parameters, (0.0,)]
    for _ in range(MAX_STEPS - len(steps)):
        recipe = with_step(recipe, ADD, 1.0)
    assert with_step(recipe, ADD, 1.0) is None
    assert with_step((), ERFINV) is None


@pytest.mark.parametrize("by_hand", [True, False], ids=["mul, add, clamp", "clamp, mul"])
def test_a_truncated_normal_by_hand_has_the_values_of_its_steps(by_hand):
    bound, root, std, mean = 0.9544997, 2.0**0.5, 0.02, 0.01
    if by_hand:
        steps = (MULTIPLY, std * root, 0.0), (ADD, mean, 0.0), (CLAMP, mean - 2 * std, mean + 2 * std)
    else:  # the bounds are those of a standard normal
        steps = (MULTIPLY, root, 0.0), (CLAMP, -2.0, 2.0), (MULTIPLY, std, 0.0), (ADD, mean, 0.0)
    uniform, fused = torch.zeros(1000), torch.zeros(1000)
    fills = Fills(SEED, CPU)
    fills.add(uniform.data_ptr(), 1000, torch.float32, (Write(UNIFORM, (-bound, bound)),))
    write = Write(UNIFORM, (-bound, bound), 0, ((ERFINV, 0.0, 0.0), *steps))
    fills.add(fused.data_ptr(), 1000, torch.float32, (write,))
    fills.run()
    torchs = mean + std * root * torch.erfinv(uniform)  # beyond no bound
    native.erfinv(uniform.data_ptr(), 1000)
    for op, a, b in steps:
        uniform = uniform * a if op == MULTIPLY else uniform + a if op == ADD else uniform.clamp(a, b)
    assert same_bits(uniform, fused)
    torch.testing.assert_close(fused, torchs, rtol=0, atol=1e-7)


SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@cases(300)
@given(st.data(), SHAPES, DTYPES)
def test_a_whole_tensor_has_the_streams_of_its_writes_in_program_order(data, shape, dtype):
    recipe = data.draw(recipes(shape))
    whole = torch.zeros(shape, dtype=dtype)
    fills = Fills(SEED, CPU)
    fills.add(whole.data_ptr(), whole.numel(), dtype, recipe)
    fills.run()
    assert same_bits(whole, expected(shape, dtype, recipe))
    everything = filled(torch.full(shape, UNTOUCHED, dtype=dtype), recipe, [flat_box(0, numel(shape))])
    assert same_bits(everything, whole)


@cases(300)
@given(st.data(), SHAPES, DTYPES)
def test_a_rectangle_of_any_strides_has_the_bits_of_the_whole_and_its_surroundings_stay(data, shape, dtype):
    recipe = data.draw(recipes(shape))
    start, sizes = data.draw(rectangles(shape))
    memory = torch.full([size + 1 for size in reversed(sizes)], UNTOUCHED, dtype=dtype)
    # A transposed part of a larger memory: no stride is what contiguous memory has.
    local = memory[tuple(slice(1, None) for _ in sizes)].permute(*reversed(range(len(sizes))))
    filled(local, recipe, [Window(shape, tuple(start)).box(sizes, local.stride())])
    rectangle = tuple(slice(first, first + size) for first, size in zip(start, sizes, strict=True))
    assert same_bits(local, expected(shape, dtype, recipe)[rectangle])
    assert (memory == UNTOUCHED).sum() >= memory.numel() - local.numel()
    local.fill_(UNTOUCHED)
    assert (memory == UNTOUCHED).all()


@cases(300)
@given(st.data(), SHAPES, DTYPES, st.integers(1, 9))
def test_flat_slices_have_the_bits_of_the_whole_and_their_padding_is_not_touched(data, shape, dtype, world):
    recipe = data.draw(recipes(shape))
    length = math.ceil(numel(shape) / world)
    slices = torch.full((world, length), UNTOUCHED, dtype=dtype)
    for rank, local in enumerate(slices):
        begin, end = (min(each * length, numel(shape)) for each in (rank, rank + 1))
        filled(local, recipe, [flat_box(begin, end)])
    whole = expected(shape, dtype, recipe)
    assert same_bits(slices.flatten()[: whole.numel()].view(shape), whole)
    assert (slices.flatten()[whole.numel() :] == UNTOUCHED).all()


def test_several_tensors_of_one_batch_keep_the_order_of_their_own_writes():
    shape = (6, 5)
    view = torch.empty(shape)
    recipes = [
        (Write(NORMAL, (0.0, 1.0), 0), Write(CONSTANT, (7.0,), region=Region(5, (5,), (1,)))),
        (Write(NORMAL, (0.0, 1.0), 1, region=Region(0, *_sizes_and_strides(view.flatten().unfold(0, 4, 2)))),),
        (),
        (Write(CONSTANT, (1.0,)), Write(UNIFORM, (0.0, 1.0), 2, region=Region(1, (6, 2), (5, 2)))),
    ]
    fills, shards = Fills(SEED, CPU), []
    for recipe in recipes:
        shards.append(torch.full((6, 2), UNTOUCHED))
        fills.add_part(shards[-1].data_ptr(), torch.float32, recipe, [Window(shape, (0, 1)).box((6, 2), (2, 1))])
    assert fills.count == 5
    fills.run()
    for recipe, shard in zip(recipes, shards, strict=True):
        assert same_bits(shard, expected(shape, torch.float32, recipe)[:, 1:3])


def _sizes_and_strides(view):
    return tuple(view.shape), view.stride()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
def test_writes_that_overlap_keep_their_order_on_several_threads(whole):
    # A thread takes 65536 elements at a time. Out of order, the next one would write the end of those too early.
    rows, row = 64, 1 << 16
    length = (rows + 1) * row // 2
    slow = Write(NORMAL, (0.0, 1.0), 0, region=Region(0, (rows, row), (row // 2, 1)))
    quick = Write(CONSTANT, (3.0,), region=Region(length - row // 8, (row // 8,), (1,)))
    recipe = (slow, quick, slow._replace(stream=1), quick._replace(parameters=(4.0,)))
    local, fills = torch.zeros(length), Fills(SEED, CPU)
    if whole:
        fills.add(local.data_ptr(), length, torch.float32, recipe)
    else:
        fills.add_part(local.data_ptr(), torch.float32, recipe, [flat_box(0, length)])
    fills.run()
    assert same_bits(local, expected((length,), torch.float32, recipe))


def test_tensors_of_more_dimensions_than_a_kernel_takes_are_filled_in_parts():
    shape = (2,) * 10
    region = Region(1, (2,) * 9, contiguous_strides(shape)[:9])
    recipe = (Write(NORMAL, (0.0, 1.0)), Write(NORMAL, (5.0, 1.0), 1, region=region))
    window = (slice(1, None), *[slice(None)] * 9)
    local = torch.empty_strided((1, *shape[1:]), tuple(reversed(contiguous_strides(shape))))
    filled(local, recipe, [Window(shape, (1, *[0] * 9)).box(local.shape, local.stride())])
    assert same_bits(local, expected(shape, torch.float32, recipe)[window])


@pytest.mark.parametrize("dtype", HALVES)
def test_a_part_in_half_precision_is_the_rounded_part_of_the_fp32_tensor(dtype):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    recipe = (Write(UNIFORM, (-0.9, 0.9), 0, ((ERFINV, 0.0, 0.0), (MULTIPLY, 0.02, 0.0))),)
    box = Window((40, 30), (11, 3)).box((20, 9), (9, 1))
    exact = filled(torch.empty(20, 9), recipe, [box])
    assert same_bits(filled(torch.empty(20, 9, dtype=dtype), recipe, [box]), exact.to(dtype))


# --- DTensors ---------------------------------------------------------------------------------------------------------


def arange(shape):
    return torch.arange(numel(shape), dtype=torch.float32).view(shape)


def assert_describes(dtensor):
    """Fail unless the boxes of a DTensor that holds its own indices say which elements it has, each once."""
    local = dtensor.to_local().detach()
    found = all_places(local_boxes(dtensor))
    assert len(found) == local.numel()
    storage = local.as_strided((max(found.values(), default=-1) + 1,), (1,))
    assert [int(storage[place]) for place in found.values()] == list(found)


def places_of(dtensor):
    return list(all_places(local_boxes(dtensor)))


takes_parts = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="before torch 2.7 distribute_tensor has rank 0 send what each rank holds already"
)


@takes_parts
@cases(150)
@given(distributions())
def test_boxes_say_which_elements_torch_has_given_to_each_rank(distribution):
    shape, sizes, placements = distribution

    def check(rank):
        mesh = init_device_mesh("cpu", sizes)
        assert_describes(distribute_tensor(arange(shape), mesh, placements, src_data_rank=None))

    on_every_rank(math.prod(sizes), check)


@takes_parts
@cases(60)
@given(st.data(), distributions(), DTYPES)
def test_the_shards_of_every_rank_have_the_bits_of_the_whole(data, distribution, dtype):
    shape, sizes, placements = distribution
    recipe = data.draw(recipes(shape))
    whole = expected(shape, dtype, recipe)

    def check(rank):
        mesh = init_device_mesh("cpu", sizes)
        reference = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        ours = torch.full_like(reference.to_local(), UNTOUCHED)
        filled(ours, recipe, local_boxes(reference))
        assert same_bits(ours, reference.to_local())

    on_every_rank(math.prod(sizes), check)


@takes_parts
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 10, 16, 27])
@pytest.mark.parametrize("data, tensor", [(2, 2), (4, 2), (2, 3), (3, 2)])
def test_boxes_follow_fully_shard_over_tensor_parallelism_also_where_rows_divide_unevenly(rows, data, tensor):
    def check(rank):
        mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
        layer = nn.Linear(3, rows, bias=False)
        parallel = distribute_tensor(arange((rows, 3)), mesh["tensor"], [Shard(0)], src_data_rank=None)
        layer.weight = nn.Parameter(parallel)
        fully_shard(layer, mesh=mesh["data"])
        assert_describes(layer.weight)
        return places_of(layer.weight)

    elements = on_every_rank(data * tensor, check)
    assert sorted(chain.from_iterable(elements)) == list(range(rows * 3))


# Before, torch refused such shards or described them in another way.
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch 2.13 defines how a strided shard divides unevenly")
@pytest.mark.parametrize("rows", [1, 5, 7, 9, 10])
@pytest.mark.parametrize("later", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("sizes", [(2, 2), (4, 2), (2, 3)])
def test_boxes_follow_torch_where_it_divides_by_an_uneven_strided_placement_itself(rows, later, sizes):
    def check(rank):
        mesh = init_device_mesh("cpu", sizes)
        placements = [_StridedShard(0, split_factor=sizes[1]), later]
        assert_describes(distribute_tensor(arange((rows, 2)), mesh, placements, src_data_rank=None))

    on_every_rank(math.prod(sizes), check)


def test_boxes_follow_fully_shard_over_a_replicated_axis_and_a_dimension_other_than_the_first():
    def check(rank):
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("replicate", "shard"))
        model = nn.Linear(6, 4)
        model.weight.data, model.bias.data = arange((4, 6)), arange((4,))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)
        assert_describes(model.weight)
        assert_describes(model.bias)
        return places_of(model.weight), places_of(model.bias)

    elements = on_every_rank(6, check)
    assert elements[0][1] == [0, 1] and elements[2][1] == [], "an uneven shard and an empty one"
    assert elements[:3] == elements[3:], "replicas"


@takes_parts
def test_boxes_of_a_meta_tensor_are_those_of_the_real_one():
    def check(rank):
        mesh = init_device_mesh("cpu", (3,))
        real, meta = (
            distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
            for tensor in (arange((7, 2)), torch.empty(7, 2, device="meta"))
        )
        assert local_boxes(real) == local_boxes(meta)

    on_every_rank(3, check)


def test_boxes_follow_the_strides_of_a_local_tensor_that_is_not_contiguous():
    def check(rank):
        mesh = init_device_mesh("cpu", (2,))
        whole = arange((6, 4))
        local = whole[3 * rank : 3 * rank + 3].t().contiguous().t()
        dtensor = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        assert dtensor.to_local().stride() == (1, 3)
        assert_describes(dtensor)

    on_every_rank(2, check)


@takes_parts
def test_scalars_and_tensors_without_elements_have_boxes_too():
    def check(rank):
        mesh = init_device_mesh("cpu", (2,))
        scalar, nothing = (
            distribute_tensor(arange(shape), mesh, [Replicate()], src_data_rank=None) for shape in ((), (0, 3))
        )
        recipe = (Write(NORMAL, (0.0, 1.0)),)
        filled(scalar.to_local(), recipe, local_boxes(scalar))
        assert same_bits(scalar.to_local(), expected((), torch.float32, recipe))
        assert local_boxes(nothing) == []

    on_every_rank(2, check)


@takes_parts
def test_a_rank_outside_of_the_mesh_has_no_elements():
    def check(rank):
        mesh = dist.DeviceMesh("cpu", [0, 1])
        return places_of(distribute_tensor(arange((4,)), mesh, [Shard(0)], src_data_rank=None))

    assert on_every_rank(3, check) == [[0, 1], [2, 3], []]


def test_a_partial_placement_is_refused_by_name():
    def check(rank):
        mesh = init_device_mesh("cpu", (2,))
        dtensor = DTensor.from_local(torch.zeros(3), mesh, [Partial()], run_check=False)
        with pytest.raises(ValueError, match=r"contain Partial.*initialize the tensor as Shard or Replicate"):
            local_boxes(dtensor)

    on_every_rank(2, check)


def test_a_local_tensor_that_is_not_what_its_placements_say_is_refused():
    def check(rank):
        mesh = init_device_mesh("cpu", (2,))
        local = torch.zeros(4 if rank else 2)
        dtensor = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(6,), stride=(1,))
        with pytest.raises(
            ValueError, match=r"local tensor has shape .* mesh of shape \(2,\) .* tensor of shape \(6,\)"
        ):
            local_boxes(dtensor)

    on_every_rank(2, check)


def test_groups_that_no_later_axis_has_made_leave_a_shard_of_several_runs():
    assert shard_runs(10, [Cut(2, 0, groups=3)]) == [(0, 2), (4, 2), (8, 1)]
    assert shard_runs(10, [Cut(2, 0, groups=3), Cut(2, 1)]) == [(5, 1), (8, 1)]
    assert shard_runs(0, [Cut(2, 1)]) == []


def test_importing_the_module_does_not_import_torch_distributed_tensor():
    code = "import torch, sys; before = set(sys.modules); import fastinit.sharding; print(set(sys.modules) - before)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "fastinit.sharding" in imported and "torch.distributed.tensor" not in imported


def test_numpy_keeps_the_last_of_equal_indices_as_the_expected_values_assume():
    array = np.zeros(3)
    array[np.array([1, 1, 2, 1])] = np.array([1.0, 2.0, 3.0, 4.0])
    assert array.tolist() == [0.0, 4.0, 3.0]
