"""What goes around a model or into it: averages, adapters, losses, privacy, spikes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .model import Model


def ema_pytorch_models() -> Mapping[str, Model]:
    import ema_pytorch

    return {
        "EMA": Model(lambda: ema_pytorch.EMA(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))),
        "EMA, updated": Model(lambda: _updated(ema_pytorch.EMA)),
        "PostHocEMA": Model(lambda: _updated(ema_pytorch.PostHocEMA, sigma_rels=(0.05, 0.3))),
    }


def lycoris_models() -> Mapping[str, Model]:
    import lycoris

    def model(**options: Any) -> Model:
        def make() -> nn.Module:
            base = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(4, 8, 3))
            wrapper = lycoris.create_lycoris(base, 1.0, linear_dim=4, linear_alpha=2.0, **options)
            wrapper.apply_to()
            return wrapper

        return Model(make)

    return {name: model(algo=name) for name in ("lora", "loha", "lokr", "full", "diag-oft", "boft", "glora", "ia3")}


def opacus_models() -> Mapping[str, Model]:
    import opacus
    from opacus import layers

    return {
        "DPLSTM": Model(lambda: layers.DPLSTM(4, 8, bidirectional=True), lambda m: m(torch.randn(3, 2, 4))),
        "DPGRU": Model(lambda: layers.DPGRU(4, 8, num_layers=2)),
        "DPMultiheadAttention": Model(lambda: layers.DPMultiheadAttention(8, 2, add_bias_kv=True)),
        "GradSampleModule": Model(lambda: opacus.GradSampleModule(nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8)))),
    }


def pytorch_metric_learning_models() -> Mapping[str, Model]:
    from pytorch_metric_learning import losses

    def loss(m: nn.Module) -> Any:
        return m(torch.randn(4, 8), torch.tensor([0, 1, 2, 3]))

    names = "ArcFaceLoss CosFaceLoss SphereFaceLoss NormalizedSoftmaxLoss ProxyAnchorLoss ProxyNCALoss SoftTripleLoss"
    return {
        **{name: Model(lambda name=name: getattr(losses, name)(5, 8), loss) for name in names.split()},
        "LargeMarginSoftmaxLoss": Model(lambda: losses.LargeMarginSoftmaxLoss(5, 8)),
        "CrossBatchMemory": Model(lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), 8, 16)),
    }


def snntorch_models() -> Mapping[str, Model]:
    import snntorch

    return {
        "Leaky": Model(lambda: snntorch.Leaky(0.9, learn_beta=True, learn_threshold=True)),
        "Synaptic": Model(lambda: snntorch.Synaptic(0.9, 0.8, init_hidden=True)),
        "RLeaky": Model(lambda: snntorch.RLeaky(0.9, linear_features=8)),
        "SLSTM": Model(lambda: snntorch.SLSTM(4, 8)),
        "SConv2dLSTM": Model(lambda: snntorch.SConv2dLSTM(2, 4, 3)),
    }


def tensordict_models() -> Mapping[str, Model]:
    import tensordict
    from tensordict import nn as tensordict_nn

    def parameters() -> nn.Module:
        return tensordict_nn.TensorDictParams(tensordict.TensorDict.from_module(nn.Linear(4, 3)).data.clone())

    def sequence() -> nn.Module:
        first = tensordict_nn.TensorDictModule(nn.Linear(4, 8), in_keys=["x"], out_keys=["y"])
        return tensordict_nn.TensorDictSequential(first, tensordict_nn.TensorDictModule(nn.Linear(8, 2), ["y"], ["z"]))

    return {"TensorDictParams": Model(parameters), "TensorDictSequential": Model(sequence)}


def _updated(ema: Any, **options: Any) -> nn.Module:
    student = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    teacher = ema(student, **options)
    teacher.update()
    return teacher
