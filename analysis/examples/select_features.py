"""The features that a regression needs, by reduction of a Pyro program: python -m analysis.examples.select_features."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_bmrs as bmrs

__all__ = ["main"]


def regression(x: Tensor, y: Tensor) -> None:
    """Six weights, and observations with a known noise."""
    w = pyro.sample("w", dist.Normal(torch.zeros(6).double(), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def posterior(x: Tensor, y: Tensor) -> None:
    """The exact one; AutoNormal and AutoMultivariateNormal after SVI do as well."""
    precision = torch.eye(6).double() + 4 * x.T @ x
    mean = 4 * torch.linalg.solve(precision, x.T @ y)
    pyro.sample("w", dist.MultivariateNormal(mean, precision_matrix=precision))


def main() -> Tensor:
    """Print and return the change of evidence of removing each feature alone: two are needed."""
    torch.manual_seed(0)
    x = torch.randn(100, 6).double()
    y = x[:, 0] - 0.5 * x[:, 2] + 0.5 * torch.randn(100).double()
    reduction = bmrs.reduce(posterior, regression, {"w": dist.Delta(torch.zeros(6).double())}, x, y)
    delta_f: Tensor = reduction.delta_f["w"]
    print("Delta F in nats, >= 0 favours removal:", [round(each, 1) for each in delta_f.tolist()])
    return delta_f


if __name__ == "__main__":
    main()
