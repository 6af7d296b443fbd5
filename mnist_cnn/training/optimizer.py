"""The optimizer: orthogonalised momentum for filters, AdamW for everything else.

AdamW is torch's function, not its class: the first object of a class of `torch.optim` imports
torch._dynamo, which takes over a second of a training that takes a few.
"""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Newton-Schulz coefficients of Keller Jordan, Muon (2024), https://kellerjordan.github.io/posts/muon
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 3
_BETAS, _EPSILON = (0.9, 0.99), 1e-8


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return the matrix (rows <= columns, float32) with its singular values drawn towards 1."""
    result: Tensor = matrix / (matrix.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = result @ result.T
        result = torch.addmm(
            result, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), result, beta=_A
        )
    return result


class Optimizer:
    """Updates parameters in place from their gradients; its state is a dict of named tensors.

    Filters (4 dimensions) follow Muon and are kept at a constant norm; the rest follows AdamW.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        *,
        filter_rate: float,
        momentum: float,
        rate: float,
        weight_decay: float,
    ) -> None:
        parameters = dict(named)
        self._filters = [p for p in parameters.values() if p.ndim == 4]  # noqa: PLR2004 - convolutions
        self._rest = [p for p in parameters.values() if p.ndim != 4]  # noqa: PLR2004
        self._velocity = [torch.zeros_like(p) for p in self._filters]
        self._mean = [torch.zeros_like(p) for p in self._rest]
        self._square = [torch.zeros_like(p) for p in self._rest]
        self._filter_rate, self._momentum = filter_rate, momentum
        self._rate, self._weight_decay = rate, weight_decay
        self.parameters = list(parameters.values())

    @torch.no_grad()
    def step(self, count: int, factor: float) -> None:
        """Take step number `count` (from 1) with both learning rates multiplied by `factor`."""
        gradients = [_gradient(p) for p in self._filters]
        torch._foreach_mul_(self._velocity, self._momentum)
        torch._foreach_add_(self._velocity, gradients)
        nesterov = torch._foreach_add(gradients, self._velocity, alpha=self._momentum)  # noqa: SLF001 - torch has no public name for it
        for weight, direction in zip(self._filters, nesterov, strict=True):
            rows = len(weight)
            weight.mul_(rows**0.5 / weight.norm())
            update = orthogonalise(direction.reshape(rows, -1)).view(weight.shape)
            weight.add_(update, alpha=-self._filter_rate * factor)

        # `adamw` counts up by itself: a step counter for each parameter, on its device.
        counts = torch.full((len(self._rest),), count - 1.0, device=self._rest[0].device)
        adamw(
            self._rest,
            [_gradient(p) for p in self._rest],
            self._mean,
            self._square,
            [],
            list(counts.unbind()),
            fused=True,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=self._rate * factor,
            weight_decay=self._weight_decay,
            eps=_EPSILON,
            maximize=False,
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the live tensors that a checkpoint must hold; copy into them to restore."""
        named = chain(
            ((f"velocity.{i}", t) for i, t in enumerate(self._velocity)),
            ((f"mean.{i}", t) for i, t in enumerate(self._mean)),
            ((f"square.{i}", t) for i, t in enumerate(self._square)),
        )
        return dict(named)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "step() before backward()"
    return parameter.grad
