"""Compares a model that torch alone makes with what each mode of fastinit makes of the same constructor."""

from __future__ import annotations

import torch
from models import (
    WAYS,
    assert_rounded_once,
    assert_same_bits,
    assert_same_structure,
    built,
    made,
    plain,
    registered,
    same_bits,
)
from scipy import stats
from torch import nn

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
    ours = built(constructor, "bf16")
    assert_same_structure(ours, plain(constructor, "bf16"))
    assert_rounded_once(ours, built(constructor))


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
            model.load_state_dict(state)
        different = [name for name, tensor in model.state_dict().items() if not _equal(tensor, state[name])]
        assert not different, f"{way}: {different}"


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
