"""DeepSpeed ZeRO-3: models whose parameters are partitions from the start, each rank's slices filled in place.

``deepspeed.zero.Init`` allocates and initializes every parameter whole on every rank, broadcasts it, and keeps one
slice. Here a rank's slices are allocated together and filled in one batch, with the values of the unsharded model. Then
a ``zero.Init`` that nobody enters makes the parameters its own, so that everything else about them is DeepSpeed's
doing. It has no public function for that: hence the range of versions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from .execution import Timing, allocate, reserve
from .layout import flat_box, numel
from .record.block import warn_never_initialized
from .record.records import modes_off
from .record.tensors import swap_in
from .record.unwritten import Origin, Piece, Unwritten, write_pieces

__all__ = ["zero3"]

# Those that the tests were run with: the first, and the first one that is too new. pyproject.toml asks for them.
_VERSIONS = ((0, 17), (0, 20))

_Owned: TypeAlias = "tuple[nn.Module, str, nn.Parameter, Origin | None]"


def zero3(ds_config: dict[str, Any] | str) -> Zero3:
    """How ZeRO stage 3 divides a model: a value for ``fastinit.on(..., shard=...)``.

    Each rank gets its slice of every parameter, on the device and in the dtype that the configuration says, with the
    bits that the unsharded model has there: flattened row-major, ``ceil(numel / ranks)`` elements for each rank, the
    last one's padding zero. Tied parameters are one. ``deepspeed.initialize``, ``deepspeed.zero.GatheredParameters``
    and checkpoints find what ``deepspeed.zero.Init`` would have left, slices that are offloaded to the CPU and the
    secondary ones of hpZ included.

    Like ``deepspeed.zero.Init``, this initializes the process group if need be and selects the GPU of this rank, so
    every rank calls it, before its `fastinit.on`; and unless the configuration's ``memory_efficient_linear`` is false,
    creating the model replaces ``torch.nn.functional.linear`` for the rest of the process.

    Args:
        ds_config: what ``deepspeed.initialize(config=...)`` takes: a dictionary, or the path of a JSON file.

    Returns:
        An object for any number of models.

    Raises:
        ImportError: there is no DeepSpeed, or one of a version that this was not tested with.
        ValueError: a stage other than 3, offload of parameters to NVMe, or quantized weights.
        RuntimeError: the process group could not be initialized.

    Example:
        >>> with fastinit.on("cuda", "bf16", shard=fastinit.deepspeed.zero3(ds_config)):  # doctest: +SKIP
        ...     model = Llama(config)
        >>> engine, *_ = deepspeed.initialize(model=model, config=ds_config)  # doctest: +SKIP
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            "fastinit.deepspeed.zero3 needs DeepSpeed: pip install 'torch-fastinit[deepspeed]'"
        ) from error
    _refuse_version(deepspeed.__version__)
    _initialize_process_group(deepspeed)
    from deepspeed.runtime.config import DeepSpeedConfig

    _refuse_options(DeepSpeedConfig(ds_config))
    return Zero3(deepspeed.zero.Init(config_dict_or_path=ds_config))


class Zero3:
    """Makes ZeRO-3 partitions of parameters, by the rules of a ``deepspeed.zero.Init``; `zero3` returns one."""

    def __init__(self, init: Any) -> None:
        self._init = init
        self.dtype: torch.dtype = init.dtype
        self.device: torch.device = init.local_device
        self.slice_device = torch.device("cpu") if init.remote_device == "cpu" else self.device

    def begin(self) -> Callable[[], None]:
        """Have Transformers create models as it does without ZeRO-3, until what is returned is called.

        While a configuration of its own says stage 3, it enters a zero.Init for every model that it creates, also for
        one that the constructor of another makes. What this partitions, rank 0 alone initializes, and the other ranks
        miss that when the outer model initializes what is left.
        """
        transformers: Any = sys.modules.get("transformers.integrations.deepspeed")
        active = getattr(transformers, "_hf_deepspeed_config_weak_ref", None)
        if active is None:
            return lambda: None
        transformers.unset_hf_deepspeed_config()

        def put_back() -> None:
            if transformers._hf_deepspeed_config_weak_ref is None:
                transformers._hf_deepspeed_config_weak_ref = active

        return put_back

    def place(self, parameters: Sequence[_Owned], timing: Timing) -> None:
        """Turn parameters into ZeRO-3 partitions, in this order, which has to be the same on all ranks.

        Args:
            parameters: of modules, with their names there; tied ones under each of them. Those with a recipe are on the
                meta device, the others have values.
            timing: gets what memory and fills take.

        Raises:
            ValueError: the context's device or dtype is not the one that the configuration trains with, or a parameter
                has neither values nor a recipe. The parameters are as they were.
        """
        with modes_off(), torch.no_grad():
            new = {id(each[2]): each for each in parameters if not hasattr(each[2], "ds_id")}
            self._refuse(list(new.values()))
            partitions = [(each, self._slices(*each[2:])) for each in new.values()]
            with timing.allocating():
                self._allocate([slices for _, slices in partitions])
            self._fill(partitions, timing)
            # Only now, when nothing is left that fails.
            for (_, _, parameter, origin), slices in partitions:
                self._hand_over(parameter, origin, slices)
            if self.slice_device.type == "cuda":
                # DeepSpeed gathers on streams of its own, which do not wait for this one.
                torch.cuda.current_stream(self.slice_device).synchronize()
            if self._init.mem_efficient_linear:
                _save_memory_in_linear()

    def _refuse(self, parameters: Sequence[_Owned]) -> None:
        floating = [parameter.dtype for _, _, parameter, _ in parameters if parameter.is_floating_point()]
        if floating and self.dtype not in floating:
            raise ValueError(
                f"fastinit.on: dtype={floating[0]}, but shard=zero3(ds_config) trains in {self.dtype}; pass that, or "
                'change "bf16" and "fp16" in ds_config'
            )
        for module, name, parameter, origin in parameters:
            if origin is None and parameter.is_meta:
                raise ValueError(
                    f"fastinit.on: the constructor of {type(module).__name__} created its parameter {name!r} on the "
                    "meta device, so that shard=zero3(ds_config) has no values for it; create it without device="
                )
            if origin is not None and origin.device != self.device:
                raise ValueError(
                    f"fastinit.on: device={str(origin.device)!r} holds {type(module).__name__}.{name}, but "
                    f"shard=zero3(ds_config) trains on {str(self.device)!r}, the device of this rank; pass that"
                )

    def _slices(self, parameter: nn.Parameter, origin: Origin | None) -> list[_Slice]:
        """This rank's slice of a parameter, and with hpZ its slice of the secondary partition."""
        from deepspeed import comm

        init = self._init
        # An expert's parameters have a group of their own.
        group = getattr(parameter, "ds_zero_partition_process_group", init.ds_process_group)
        elements = numel(parameter.shape if origin is None else origin.shape)
        ranks = comm.get_world_size(group=group)
        size = -(-elements // ranks)
        dtype = self.dtype if parameter.is_floating_point() else parameter.dtype
        slices = [_Slice(elements, size, comm.get_rank(group=group), dtype, parameter.requires_grad)]
        if init.zero_param_process_group is not None:
            size = size * ranks // init.num_ranks_in_param_group
            slices.append(_Slice(elements, size, init.rank_in_group, dtype, parameter.requires_grad))
        return slices

    def _allocate(self, slices: Sequence[list[_Slice]]) -> None:
        # The engine moves the primary slices that are trained to one large buffer, frees them, and keeps the others
        # where they are. In a segment of their own they leave a piece of memory that is large enough for the buffer.
        for secondary, trained in ((False, True), (False, False), (True, True), (True, False)):
            group = [each for pair in slices for each in pair[secondary : secondary + 1] if each.trained == trained]
            if self.slice_device.type == "cuda":
                reserve([each.size * each.dtype.itemsize for each in group], self.slice_device)
            for each in group:
                each.memory = allocate((each.size,), each.dtype, self.slice_device)
                if self._init.pin_memory:
                    from deepspeed.accelerator import get_accelerator

                    each.memory = get_accelerator().pin_memory(each.memory)

    def _fill(self, partitions: Sequence[tuple[_Owned, list[_Slice]]], timing: Timing) -> None:
        pieces = []
        for (module, name, parameter, origin), slices in partitions:
            for each in slices:
                count = each.end - each.begin
                if origin is not None and count:
                    pieces.append(Piece(each.memory, origin, [flat_box(each.begin, each.end)]))
                elif count:
                    each.memory[:count].copy_(parameter.detach().reshape(-1)[each.begin : each.end])
                if count < each.size:
                    each.memory[count:].zero_()
            if origin is not None and not origin.recipe:
                warn_never_initialized(f"{type(module).__name__}.{name}", origin.shape)
        write_pieces(pieces, timing)

    def _hand_over(self, parameter: nn.Parameter, origin: Origin | None, slices: Sequence[_Slice]) -> None:
        """Let DeepSpeed see a parameter of the right shape, dtype and device, which has been partitioned already."""
        from deepspeed.runtime.zero.partition_parameters import free_param

        shape = parameter.shape if origin is None else origin.shape
        whole = torch.empty((), dtype=slices[0].dtype, device=self.device).expand(shape)
        # The parameter stays the object that it is. torch.utils.swap_tensors would exchange the attributes too.
        if type(parameter) is Unwritten:
            swap_in(parameter, whole)
        else:
            torch._C._swap_tensor_impl(parameter, nn.Parameter(whole, parameter.requires_grad))
        self._init._convert_to_deepspeed_param(parameter)
        partitioned: Any = parameter
        partitioned.ds_numel_aligned = partitioned.aligned_size()
        partitioned.ds_tensor = _described(slices[0])
        if len(slices) > 1:
            partitioned.ds_secondary_tensor = _described(slices[1])
        free_param(partitioned)


class _Slice:
    """A rank's part of a flattened parameter: so many elements of memory, of which the last ones may be padding."""

    memory: torch.Tensor

    def __init__(self, elements: int, size: int, index: int, dtype: torch.dtype, trained: bool) -> None:
        self.size = size
        self.begin = min(index * size, elements)
        self.end = min(self.begin + size, elements)
        self.dtype = dtype
        self.trained = trained


def _described(piece: _Slice) -> torch.Tensor:
    """The memory of a slice, with what DeepSpeed wants to know of it."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    memory: Any = piece.memory
    memory.ds_numel = piece.size
    memory.status = PartitionedParamStatus.AVAILABLE
    memory.final_location = None  # nvme, or None
    return piece.memory


def _save_memory_in_linear() -> None:
    """Do what entering a ``zero.Init`` does: torch's own function keeps gathered weights until the backward pass."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as patches

    if not hasattr(patches, "linear_bk"):
        patches.linear_bk = functional.linear  # which DeepCompile puts back
    if functional.linear is patches.linear_bk:
        functional.linear = zero3_linear_wrap


def _refuse_version(version: str) -> None:
    first, end = _VERSIONS
    if not first <= tuple(int(part) for part in version.split(".")[:2]) < end:
        raise ImportError(
            f"fastinit.deepspeed.zero3 knows how DeepSpeed {first[0]}.{first[1]} up to, but not including, "
            f"{end[0]}.{end[1]} keeps partitions, and this is {version}; pip install 'torch-fastinit[deepspeed]'"
        )


def _initialize_process_group(deepspeed: Any) -> None:
    if not deepspeed.comm.is_initialized():
        try:
            deepspeed.init_distributed()
        except Exception as error:
            raise RuntimeError(
                "fastinit.deepspeed.zero3: the process group could not be initialized; start the script with torchrun "
                f"or deepspeed, or call torch.distributed.init_process_group before. {error}"
            ) from error
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError(
            "fastinit.deepspeed.zero3: DeepSpeed takes this rank's device from the environment variable LOCAL_RANK, "
            "which is not set; start the script with torchrun or deepspeed, or set it"
        )


def _refuse_options(config: Any) -> None:
    """Raise ValueError for what would make a partition something else than slices of the parameters' values."""
    zero = config.zero_config
    if zero.stage != 3:
        raise ValueError(
            f'fastinit.deepspeed.zero3: ds_config has zero_optimization.stage={int(zero.stage)}; set "stage": 3, or '
            "create the model without shard="
        )
    offload = zero.offload_param.device if zero.offload_param else None
    refused = {
        "zero_optimization.offload_param.device": offload if offload == "nvme" else None,
        "zero_optimization.zero_quantized_weights": zero.zero_quantized_weights,
        "zero_optimization.zero_quantized_nontrainable_weights": zero.zero_quantized_nontrainable_weights,
        "weight_quantization": config.weight_quantization_config,
        "zero_optimization.mics_shard_size": max(getattr(zero, "mics_shard_size", -1), 0),
    }
    for option, value in refused.items():
        if value:
            raise ValueError(
                f"fastinit.deepspeed.zero3: ds_config has {option}={value!r}, which is not supported; remove it, or "
                "create the model under deepspeed.zero.Init"
            )
