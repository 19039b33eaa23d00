"""Graphs of autograd that lead to tensors which become real."""

from __future__ import annotations

from typing import Any

import torch

_grad_fn: Any = torch.Tensor.grad_fn


def is_leaf(tensor: torch.Tensor) -> bool:
    """Whether no graph leads to a tensor; also for a view that torch forbids to ask, after its base was modified."""
    try:
        return tensor.is_leaf
    except RuntimeError:
        return True


Edge = tuple[Any, int]


def edge_of(tensor: torch.Tensor) -> Edge:
    """Where a graph of autograd leads to a tensor, as the nodes behind it have it."""
    return _grad_fn.__get__(tensor), tensor.output_nr


def viewed_in_graph(view: torch.Tensor, base: torch.Tensor, edges: dict[Edge, torch.Tensor]) -> torch.Tensor | None:
    """The tensor from which a view of a graph was taken, the nearest that anybody has; None if it was made otherwise.

    Whoever differentiates by that tensor is to find it in the graph.

    Args:
        view: with a graph.
        base: of which it is a view, by however many steps.
        edges: those of the tensors that become real with it.
    """
    node = _grad_fn.__get__(view)
    while node is not None and len(node.next_functions) == 1:
        edge = node.next_functions[0]
        if edge in edges:
            return edges[edge]
        node = edge[0]
        if node is not None and node.name() == "torch::autograd::AccumulateGrad":
            return base if base.requires_grad and is_leaf(base) else None
    return None


def with_graph_of(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Memory as a tensor to which the graph leads that some operation has given a tensor without any."""
    with torch.enable_grad():
        # Not as Function.apply does it, which would have the tensor become real first.
        result: torch.Tensor = super(torch.autograd.Function, _WithMemory).apply(tensor, memory)  # type: ignore[no-untyped-call]
    return result


class _WithMemory(torch.autograd.Function):
    """The graph of a placeholder that some operation computed, for the tensor that takes its place."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return memory.detach()  # not as a view, which torch would not let anybody write to in place

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None
