"""Gaussian processes, flows, Bayesian networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .model import Model


def gpytorch_models() -> Mapping[str, Model]:
    import gpytorch
    from gpytorch import kernels

    class Exact(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            x, y = torch.linspace(0, 1, 8), torch.linspace(0, 1, 8).sin()
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = kernels.ScaleKernel(kernels.RBFKernel())

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    class Variational(gpytorch.models.ApproximateGP):
        def __init__(self, distribution: str, points: int = 6) -> None:
            chosen = getattr(gpytorch.variational, distribution)(points)
            super().__init__(gpytorch.variational.VariationalStrategy(self, torch.randn(points, 2), chosen))
            self.mean_module, self.covar_module = (
                gpytorch.means.LinearMean(2),
                kernels.ScaleKernel(kernels.MaternKernel(ard_num_dims=2)),
            )

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def prior() -> Any:
        return gpytorch.priors.GammaPrior(3.0, 6.0)

    return {
        "ExactGP": Model(Exact),
        **{
            name: Model(lambda name=name: Variational(name))
            for name in (
                "CholeskyVariationalDistribution",
                "MeanFieldVariationalDistribution",
                "NaturalVariationalDistribution",
                "TrilNaturalVariationalDistribution",
            )
        },
        "SpectralMixtureKernel": Model(lambda: kernels.SpectralMixtureKernel(num_mixtures=3)),
        "PeriodicKernel": Model(lambda: kernels.PeriodicKernel(lengthscale_prior=prior())),
        "RFFKernel": Model(lambda: kernels.RFFKernel(num_samples=8, num_dims=2)),
        "IndexKernel": Model(lambda: kernels.IndexKernel(num_tasks=3, rank=2)),
        "MultitaskKernel": Model(lambda: kernels.MultitaskKernel(kernels.RBFKernel(), num_tasks=2)),
        "GridInterpolationKernel": Model(
            lambda: kernels.GridInterpolationKernel(
                kernels.RBFKernel(), grid_size=8, num_dims=1, grid_bounds=[(0.0, 1.0)]
            )
        ),
        "InducingPointKernel": Model(
            lambda: kernels.InducingPointKernel(
                kernels.RBFKernel(), torch.randn(4, 2), gpytorch.likelihoods.GaussianLikelihood()
            )
        ),
        "RBFKernel with priors": Model(
            lambda: kernels.ScaleKernel(
                kernels.RBFKernel(
                    lengthscale_prior=prior(), lengthscale_constraint=gpytorch.constraints.Interval(0.1, 2.0)
                ),
                outputscale_prior=prior(),
            )
        ),
        "MultitaskGaussianLikelihood": Model(
            lambda: gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2, rank=1)
        ),
        "LKJ prior": Model(
            lambda: gpytorch.priors.LKJCovariancePrior(2, 1.0, gpytorch.priors.SmoothedBoxPrior(0.1, 2.0))
        ),
    }


def botorch_models() -> Mapping[str, Model]:
    from botorch import models

    double = {"dtype": torch.float64}

    def x() -> Any:
        return torch.linspace(0, 1, 12, **double).view(6, 2)

    def y() -> Any:
        return x().sum(-1, keepdim=True).sin()

    return {
        "SingleTaskGP": Model(lambda: models.SingleTaskGP(x(), y())),
        "MultiTaskGP": Model(
            lambda: models.MultiTaskGP(
                torch.cat([x(), torch.tensor([[0.0], [1.0]] * 3, **double)], -1), y(), task_feature=-1
            )
        ),
        "MixedSingleTaskGP": Model(lambda: models.MixedSingleTaskGP(x().round(), y(), cat_dims=[1])),
        "SingleTaskVariationalGP": Model(lambda: models.SingleTaskVariationalGP(x(), y(), inducing_points=4).model),
        "KroneckerMultiTaskGP": Model(lambda: models.KroneckerMultiTaskGP(x(), torch.cat([y(), y()], -1))),
        "ModelListGP": Model(lambda: models.ModelListGP(models.SingleTaskGP(x(), y()), models.SingleTaskGP(x(), y()))),
    }


def pyro_models() -> Mapping[str, Model]:
    from pyro import distributions
    from pyro import nn as pyro_nn
    from pyro.contrib import gp
    from pyro.distributions import transforms

    class Bayesian(pyro_nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = pyro_nn.PyroModule[nn.Linear](4, 2)
            self.linear.bias = pyro_nn.PyroSample(distributions.Normal(0.0, 1.0).expand([2]).to_event(1))
            self.scale = pyro_nn.PyroParam(torch.ones(2), constraint=distributions.constraints.positive)

    return {
        "PyroModule": Model(Bayesian),
        "DenseNN": Model(lambda: pyro_nn.DenseNN(4, [8], [2, 2]), lambda m: m(torch.randn(2, 4))),
        "AutoRegressiveNN": Model(lambda: pyro_nn.AutoRegressiveNN(4, [8]), lambda m: m(torch.randn(2, 4))),
        "Spline": Model(lambda: transforms.Spline(3)),
        "Planar": Model(lambda: transforms.Planar(3)),
        "BatchNorm": Model(lambda: transforms.BatchNorm(3)),
        "Householder": Model(lambda: transforms.Householder(3, 2)),
        "GeneralizedChannelPermute": Model(lambda: transforms.GeneralizedChannelPermute(3)),
        "GPRegression": Model(
            lambda: gp.models.GPRegression(torch.linspace(0, 1, 6), torch.linspace(0, 1, 6), gp.kernels.RBF(1))
        ),
    }


def zuko_models() -> Mapping[str, Model]:
    from zuko import flows

    small = {"features": 3, "context": 2, "transforms": 2, "hidden_features": (16, 16)}

    def log_prob(m: nn.Module) -> Any:
        return m(torch.randn(4, 2)).log_prob(torch.randn(4, 3))

    return {
        "MAF": Model(lambda: flows.MAF(**small), log_prob),
        "NSF": Model(lambda: flows.NSF(**small), log_prob),
        "NICE": Model(lambda: flows.NICE(**small), log_prob),
        "NAF": Model(lambda: flows.NAF(network={"hidden_features": (8,)}, **small)),
        "UNAF": Model(lambda: flows.UNAF(**small)),
        "SOSPF": Model(lambda: flows.SOSPF(**small)),
        "CNF": Model(lambda: flows.CNF(3, 2)),
        "GMM": Model(lambda: flows.GMM(3, 2), log_prob),
        "BPF": Model(lambda: flows.BPF(**small)),
    }


def normflows_models() -> Mapping[str, Model]:
    import normflows as nf

    def real_nvp() -> nn.Module:
        net = nf.nets.MLP([1, 8, 2], init_zeros=True)
        flows = [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(2, mode="swap"), nf.flows.ActNorm(2)]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(2), flows)

    return {
        "RealNVP": Model(real_nvp),
        "Glow block": Model(lambda: nf.flows.GlowBlock(4, 8, scale=True)),
        "Invertible1x1Conv": Model(lambda: nf.flows.Invertible1x1Conv(4, use_lu=True)),
        "InvertibleAffine": Model(lambda: nf.flows.InvertibleAffine(4)),
        "neural spline": Model(lambda: nf.flows.AutoregressiveRationalQuadraticSpline(3, 1, 8)),
        "Residual": Model(lambda: nf.flows.Residual(nf.nets.LipschitzMLP([2, 8, 2]))),
    }
