"""Graphs, molecules, symmetries, manifolds, operators between functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .model import Model, image


def torch_geometric_models() -> Mapping[str, Model]:
    from torch_geometric import nn as pyg

    def edges() -> Any:
        return torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])

    def graph(m: nn.Module) -> Any:
        return m(torch.randn(4, 8), edges())

    convolutions = {
        name: Model(lambda name=name: getattr(pyg, name)(8, 6), graph)
        for name in (
            "GCNConv",
            "SAGEConv",
            "GATConv",
            "GATv2Conv",
            "TransformerConv",
            "TAGConv",
            "SGConv",
            "ARMAConv",
            "GraphConv",
            "ResGatedGraphConv",
            "SuperGATConv",
            "ClusterGCNConv",
            "GENConv",
            "LEConv",
            "MFConv",
            "FiLMConv",
        )
    }
    interactions = {"hidden_channels": 16, "out_channels": 1, "num_blocks": 1, "num_spherical": 2, "num_radial": 2}
    return {
        **convolutions,
        "EGConv": Model(lambda: pyg.EGConv(8, 16), graph),
        "ChebConv": Model(lambda: pyg.ChebConv(8, 6, 3), graph),
        "RGCNConv, bases": Model(lambda: pyg.RGCNConv(8, 6, 3, num_bases=2)),
        "RGATConv": Model(lambda: pyg.RGATConv(8, 6, 3)),
        "GPSConv": Model(lambda: pyg.GPSConv(8, pyg.GCNConv(8, 8), heads=2), graph),
        "GPSConv, performer": Model(lambda: pyg.GPSConv(8, pyg.GCNConv(8, 8), heads=2, attn_type="performer")),
        "HGTConv": Model(lambda: pyg.HGTConv(8, 6, (["a", "b"], [("a", "to", "b")]), heads=2)),
        "HANConv": Model(lambda: pyg.HANConv(8, 6, (["a", "b"], [("a", "to", "b")]), heads=2)),
        "PNAConv": Model(
            lambda: pyg.PNAConv(8, 6, ["mean", "max"], ["identity", "attenuation"], torch.tensor([0, 2, 3]))
        ),
        "GCN": Model(lambda: pyg.GCN(8, 16, 2, 4), graph),
        "GIN": Model(lambda: pyg.GIN(8, 16, 2, 4), graph),
        "DeepGCNLayer": Model(lambda: pyg.DeepGCNLayer(pyg.GENConv(8, 8), nn.LayerNorm(8), nn.ReLU())),
        "AttentiveFP": Model(lambda: pyg.AttentiveFP(8, 16, 4, 3, 2, 2)),
        "SchNet": Model(lambda: pyg.SchNet(16, 16, 2, 8)),
        "DimeNet++": Model(
            lambda: pyg.DimeNetPlusPlus(int_emb_size=8, basis_emb_size=4, out_emb_channels=16, **interactions)
        ),
        "ViSNet": Model(lambda: pyg.models.ViSNet(hidden_channels=16, num_heads=2, num_layers=2, num_rbf=8)),
        "MetaPath2Vec": Model(lambda: pyg.MetaPath2Vec({("a", "to", "a"): edges()}, 8, [("a", "to", "a")], 2, 2)),
        "TransE": Model(lambda: pyg.TransE(10, 3, 8)),
        "ComplEx": Model(lambda: pyg.ComplEx(10, 3, 8)),
        "RotatE": Model(lambda: pyg.RotatE(10, 3, 8)),
        "LightGCN": Model(lambda: pyg.LightGCN(10, 8, 2)),
        "LINKX": Model(lambda: pyg.LINKX(4, 8, 16, 4, 2)),
        "Polynormer": Model(lambda: pyg.Polynormer(8, 16, 4)),
        "Set2Set": Model(lambda: pyg.Set2Set(8, 2)),
        "GraphMultisetTransformer": Model(lambda: pyg.GraphMultisetTransformer(8, 2, heads=2)),
        "HeteroDictLinear": Model(lambda: pyg.HeteroDictLinear(8, 6, ["a", "b"])),
        "lazy GCN": Model(lambda: pyg.GCNConv(-1, 6)),
        "lazy Linear": Model(lambda: pyg.Linear(-1, 6)),
    }


def e3nn_models() -> Mapping[str, Model]:
    from e3nn import nn as e3nn_nn
    from e3nn import o3

    grid = {"res": (10, 9)}
    return {
        "Linear": Model(lambda: o3.Linear("4x0e + 2x1o", "3x0e + 2x1o"), lambda m: m(torch.randn(2, 10))),
        "TensorProduct": Model(
            lambda: o3.FullyConnectedTensorProduct("2x0e + 1x1o", "0e + 1o", "2x0e + 1x1o"),
            lambda m: m(torch.randn(2, 5), torch.randn(2, 4)),
        ),
        "FullTensorProduct": Model(
            lambda: o3.FullTensorProduct("1x0e + 1x1o", "1x0e + 1x1o"),
            lambda m: m(torch.randn(2, 4), torch.randn(2, 4)),
        ),
        "ToS2Grid": Model(lambda: o3.ToS2Grid(3, **grid), lambda m: m(torch.randn(2, 16))),
        "FromS2Grid": Model(lambda: o3.FromS2Grid((10, 9), 3), lambda m: m(torch.randn(2, 10, 9))),
        "S2Activation": Model(
            lambda: e3nn_nn.S2Activation("0e + 1o + 2e", torch.tanh, 10), lambda m: m(torch.randn(2, 9))
        ),
        "SphericalHarmonics": Model(lambda: o3.SphericalHarmonics([0, 1, 2], True), lambda m: m(torch.randn(2, 3))),
        "ReducedTensorProducts": Model(lambda: o3.ReducedTensorProducts("ij=ji", i="1o")),
        "Gate": Model(
            lambda: e3nn_nn.Gate("4x0e", [torch.tanh], "2x0e", [torch.sigmoid], "2x1o"), lambda m: m(torch.randn(2, 12))
        ),
        "BatchNorm": Model(lambda: e3nn_nn.BatchNorm("4x0e + 2x1o"), lambda m: m(torch.randn(2, 10))),
        "FullyConnectedNet": Model(
            lambda: e3nn_nn.FullyConnectedNet([4, 16, 2], torch.relu), lambda m: m(torch.randn(2, 4))
        ),
    }


def geoopt_models() -> Mapping[str, Model]:
    import geoopt

    def parameter(manifold: Any, *shape: int, draw: str = "random") -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            module = nn.Module()
            module.manifold = manifold()
            module.weight = geoopt.ManifoldParameter(getattr(module.manifold, draw)(*shape), manifold=module.manifold)
            module.origin = geoopt.ManifoldTensor(torch.zeros(3), manifold=geoopt.Euclidean())
            return module

        return make

    return {
        "PoincareBall": Model(parameter(geoopt.PoincareBall, 4, 8)),
        "PoincareBall, learnable": Model(parameter(lambda: geoopt.PoincareBall(c=0.5, learnable=True), 4, 8)),
        "Lorentz": Model(parameter(geoopt.Lorentz, 4, 8, draw="random_normal")),
        "Sphere": Model(parameter(geoopt.Sphere, 4, 8)),
        "Stiefel": Model(parameter(geoopt.Stiefel, 8, 4)),
        "CanonicalStiefel": Model(parameter(geoopt.CanonicalStiefel, 8, 4)),
        "SymmetricPositiveDefinite": Model(parameter(geoopt.SymmetricPositiveDefinite, 4, 4)),
        "Euclidean": Model(parameter(geoopt.Euclidean, 4, 8)),
        "BirkhoffPolytope": Model(parameter(geoopt.BirkhoffPolytope, 4, 4)),
        "ProductManifold": Model(
            parameter(lambda: geoopt.ProductManifold((geoopt.Sphere(), 4), (geoopt.PoincareBall(), 4)), 3, 8)
        ),
    }


def neuralop_models() -> Mapping[str, Model]:
    from neuralop import models

    fourier = {"n_modes": (4, 4), "hidden_channels": 8, "in_channels": 1, "out_channels": 1, "n_layers": 1}
    return {
        "FNO": Model(lambda: models.FNO(**fourier), lambda m: m(image(16, 1))),
        "FNO, Tucker": Model(
            lambda: models.FNO(factorization="tucker", implementation="factorized", rank=0.5, **fourier)
        ),
        "FNO, CP": Model(lambda: models.FNO(factorization="cp", rank=0.5, **fourier)),
        "FNO, TT": Model(lambda: models.FNO(factorization="tt", rank=0.5, **fourier)),
        "TFNO": Model(lambda: models.TFNO(**fourier)),
    }
