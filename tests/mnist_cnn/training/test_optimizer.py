"""The optimizer against plain numpy in float64."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mnist_cnn.training.optimizer import Optimizer, orthogonalise

RATES = {"filter_rate": 0.3, "momentum": 0.6, "rate": 0.02, "weight_decay": 0.1}
FACTORS = (0.5, 1.0, 0.7, 0.2)
Arrays = dict[str, np.ndarray]


def _parameters() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"filters": (6, 3, 3, 3), "weight": (10, 7), "bias": (10,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def _gradients() -> list[Arrays]:
    draw = np.random.default_rng(1)
    return [{name: draw.normal(size=p.shape) for name, p in _parameters().items()} for _ in FACTORS]


def _stepped(named: dict[str, torch.Tensor]) -> Optimizer:
    optimizer = Optimizer(named.items(), **RATES)
    for count, (factor, gradients) in enumerate(zip(FACTORS, _gradients(), strict=True), 1):
        for name, parameter in named.items():
            parameter.grad = torch.tensor(gradients[name], dtype=torch.float32)
        optimizer.step(count, factor)
    return optimizer


def _orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """Apply Muon's polynomial to the singular values, which is all that its iterations change."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    orthogonal: np.ndarray = (left * values) @ right
    return orthogonal


@pytest.mark.parametrize("shape", [(1, 9), (8, 8), (16, 144)])
def test_orthogonalising_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    found = orthogonalise(torch.tensor(matrix, dtype=torch.float32)).numpy()
    assert np.allclose(found, _orthogonalised(matrix), atol=1e-5)


def test_orthogonalising_draws_the_singular_values_towards_one() -> None:
    matrix = np.random.default_rng(0).normal(size=(16, 144))
    values = torch.linalg.svdvals(orthogonalise(torch.tensor(matrix, dtype=torch.float32)))
    before = np.linalg.svd(matrix, compute_uv=False)
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    assert float(values.max() / values.min()) < before.max() / before.min()


def test_filters_follow_orthogonalised_nesterov_momentum_from_a_constant_norm() -> None:
    named = _parameters()
    weight = named["filters"].numpy().astype(float)
    velocity = np.zeros_like(weight)
    for factor, gradients in zip(FACTORS, _gradients(), strict=True):
        velocity = 0.6 * velocity + gradients["filters"]
        direction = gradients["filters"] + 0.6 * velocity
        weight *= np.sqrt(6) / np.linalg.norm(weight)
        weight -= 0.3 * factor * _orthogonalised(direction.reshape(6, -1)).reshape(weight.shape)
    _stepped(named)
    assert np.allclose(named["filters"].numpy(), weight, atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_the_rest_follows_adamw(name: str) -> None:
    """Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2."""
    named = _parameters()
    theta = named[name].numpy().astype(float)
    mean = np.zeros_like(theta)
    square = np.zeros_like(theta)
    for count, (factor, gradients) in enumerate(zip(FACTORS, _gradients(), strict=True), 1):
        mean = 0.9 * mean + 0.1 * gradients[name]
        square = 0.99 * square + 0.01 * gradients[name] ** 2
        update = (mean / (1 - 0.9**count)) / (np.sqrt(square / (1 - 0.99**count)) + 1e-8)
        theta -= 0.02 * factor * (update + 0.1 * theta)
    _stepped(named)
    assert np.allclose(named[name].numpy(), theta, atol=1e-6)


def test_the_state_is_what_a_step_depends_on() -> None:
    """A second optimizer that takes over parameters and state takes the same step, bitwise."""
    named = _parameters()
    optimizer = _stepped(named)
    heirs = {name: parameter.clone() for name, parameter in named.items()}
    heir = Optimizer(heirs.items(), **RATES)
    for name, tensor in heir.state().items():
        tensor.copy_(optimizer.state()[name])
    for name, parameter in named.items():
        parameter.grad = heirs[name].grad = torch.ones_like(parameter)
    optimizer.step(5, 1.0)
    heir.step(5, 1.0)
    assert all(torch.equal(named[name], heirs[name]) for name in named)


@pytest.mark.slow
def test_a_step_does_not_import_torch_dynamo() -> None:
    program = (
        "import sys, torch; from mnist_cnn.training.optimizer import Optimizer;"
        "named = {'filter': torch.ones(1, 1, 3, 3), 'bias': torch.ones(3)};"
        "[setattr(p, 'grad', torch.ones_like(p)) for p in named.values()];"
        "rates = dict(filter_rate=1, momentum=0, rate=1, weight_decay=0);"
        "Optimizer(named.items(), **rates).step(1, 1.0);"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
