"""Compares a model that torch alone makes with what each mode of fastinit makes of the same constructor."""

from __future__ import annotations

import copy

import torch
from models import (
    DTYPES,
    WAYS,
    assert_same_bits,
    assert_same_structure,
    built,
    default_dtype,
    made,
    plain,
    registered,
    same_bits,
)
from scipy import stats
from torch import nn
from torch.utils._pytree import tree_leaves

import fastinit

# Corrected for the number of random tensors in the whole zoo: one false alarm in a thousand runs of all of it.
ALPHA = 1e-3 / 100_000
_MOST = 10_000  # values of a tensor that are compared


def _values(name, tensors):
    return torch.cat([each[name].detach().flatten()[:_MOST] for each in tensors]).double().numpy()


def _p_value(theirs, ours):
    """Of the two-sample Kolmogorov-Smirnov test. Its exact form is slow for many values, the other wrong for few."""
    return stats.ks_2samp(theirs, ours, method="exact" if len(ours) < 100 else "asymp").pvalue


def device_mode(constructor):
    """In fp32: the structure, every value that torch computes or fixes, and the distribution of the others."""
    theirs = [plain(constructor, seed=seed) for seed in (1, 2)]
    ours = [built(constructor, seed=seed) for seed in (1, 2)]
    assert_same_structure(ours[0], theirs[0])
    tensors = [registered(model) for model in (*theirs, *ours)]
    fixed, rejected = [], []
    for name, tensor in tensors[0].items():
        if nn.parameter.is_lazy(tensor):
            continue
        same = [same_bits(tensor, each[name]) for each in tensors[1:]]
        if same[0]:
            if not all(same):
                fixed.append(name)
        elif (p := _p_value(_values(name, tensors[:2]), _values(name, tensors[2:]))) < ALPHA:
            rejected.append(f"{name} (p = {p:.1e})")
    assert not fixed, f"values that torch fixes differ: {fixed}"
    assert not rejected, f"distributions differ: {rejected}"


def half_precision(constructor):
    """In bf16: the structure that torch gives in that default dtype, and the fp32 values rounded once."""
    ours, exact = built(constructor, "bf16"), registered(built(constructor))
    try:
        theirs = plain(constructor, "bf16")
    except RuntimeError as error:  # of what has no such kernel: QR, say
        assert "not implemented for 'BFloat16'" in str(error)
        through_bf16 = set()
    else:
        assert_same_structure(ours, theirs)
        through_bf16 = {name for name, tensor in registered(theirs).items() if _is_bf16_in_fp32(tensor)}
    wrong = []
    for name, tensor in registered(ours).items():
        if not nn.parameter.is_lazy(tensor):
            value = exact[name].detach()
            value = value.bfloat16() if name in through_bf16 else value
            if not same_bits(tensor, value.to(tensor.dtype)) and not same_bits(tensor, exact[name].to(tensor.dtype)):
                wrong.append(name)
    assert not wrong, f"not the fp32 values rounded once: {wrong}"


def _is_bf16_in_fp32(tensor):
    """Whether a tensor in fp32 may have got its values from one in bf16."""
    return (
        not nn.parameter.is_lazy(tensor)
        and tensor.dtype == torch.float32
        and same_bits(tensor, tensor.bfloat16().float())
    )


def double_precision(constructor):
    """In fp64: the structure that torch gives in that default dtype, and every value that torch computes or fixes."""
    theirs, ours = plain(constructor, torch.float64), built(constructor, "fp64")
    assert_same_structure(ours, theirs)
    tensors = [registered(model) for model in (theirs, plain(constructor, torch.float64, seed=1), ours)]
    different = [
        name
        for name, tensor in tensors[0].items()
        if not nn.parameter.is_lazy(tensor)
        and same_bits(tensor, tensors[1][name])
        and not same_bits(tensor, tensors[2][name])
    ]
    assert not different, f"values that torch fixes differ: {different}"


def empty_then_initialize(constructor):
    assert_same_bits(made(constructor, "empty"), built(constructor))


def shard_then_materialize(constructor):
    assert_same_bits(made(constructor, "sharded"), built(constructor))


def load_inside(constructor):
    """A state dict of torch's model, loaded inside of the block, and with `empty` as well."""
    state = plain(constructor, seed=1).state_dict()
    for way in ("at once", "empty"):
        with fastinit.on("cpu", "fp32", seed=3, **WAYS[way]):
            model = constructor()
            model.load_state_dict(copy.copy(state))  # some libraries take entries out
        different = [name for name, tensor in model.state_dict().items() if not _equal(tensor, state[name])]
        assert not different, f"{way}: {different}"


def forward(constructor, call):
    """In fp32 a model with torch's values gives torch's results; in bf16, if torch's runs, results of the same kind."""
    for dtype in ("fp32", "bf16"):
        try:
            theirs = plain(constructor, dtype).eval()
            expected = _results(theirs, call, dtype)
        except RuntimeError:  # of what has no such kernel, or of operands of two dtypes
            if dtype == "fp32":
                raise
            continue
        ours = built(constructor, dtype).eval()
        ours.load_state_dict(theirs.state_dict())
        results = _results(ours, call, dtype)
        assert [_kind(each) for each in results] == [_kind(each) for each in expected], dtype
        if dtype == "fp32":
            assert all(_equal(*pair) for pair in zip(results, expected, strict=True)), "other results"


def _results(model, call, dtype):
    with torch.random.fork_rng(devices=[]), default_dtype(DTYPES[dtype]), torch.no_grad():
        torch.manual_seed(0)
        return tree_leaves(call(model))


def _kind(result):
    """What a result in half precision has in common with torch's."""
    if not isinstance(result, torch.Tensor):
        return type(result)
    return result.shape, result.dtype, bool(result.isfinite().all())


def _equal(left, right):
    if not isinstance(left, torch.Tensor):
        return left == right
    if nn.parameter.is_lazy(left):
        return nn.parameter.is_lazy(right)
    return same_bits(left, right)


MODES = {
    "device": device_mode,
    "bf16": half_precision,
    "empty": empty_then_initialize,
    "shard": shard_then_materialize,
    "load": load_inside,
}
