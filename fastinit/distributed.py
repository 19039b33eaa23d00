"""What ranks have to agree on. torch.distributed is imported by the functions that need it.

Private: it may change with any version.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch


def is_distributed() -> bool:
    """Whether there are other ranks to agree with."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def from_rank_0(seeds: list[int], device: torch.device) -> list[int]:
    """Rank 0's seeds, on every rank: the only communication that sharded creation needs.

    Raises:
        RuntimeError: ranks have different numbers of seeds, because they have created different models.
    """
    # The backend chooses between the CPU and the current GPU; all ranks of a machine must not choose the first one.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        agreed: list[list[int]] = [seeds]
        torch.distributed.broadcast_object_list(agreed, src=0)
    if len(agreed[0]) != len(seeds):
        raise RuntimeError(
            f"fastinit: this rank has {len(seeds)} seeds to agree on and rank 0 {len(agreed[0])}; create the same "
            "model on every rank, or pass seed= to fastinit.on"
        )
    return agreed[0]
