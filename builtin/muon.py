"""The Muon optimizer, for convolutions too."""

import torch
from torch import Tensor

import sample


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Moves all singular values of (N, rows, columns) matrices close to 1 (0.7 to 1.2).

    Newton-Schulz iterations of a quintic, whose coefficients were chosen for speed (Jordan et al. 2024, "Muon").
    """
    x = matrices.bfloat16() if sample.has_bf16(matrices.device) else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    if tall:
        x = x.mT
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for matrices, and for convolutions as (out, in x height x width) matrices.

    The same update as torch.optim.Muon (Jordan et al. 2024), which itself accepts only 2-D parameters.
    """

    def __init__(self, parameters, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        by_shape = {}
        for parameter in group["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():  # parameters of one shape together: fewer and larger products
            gradients = torch.stack([parameter.grad.flatten(1) for parameter in parameters])
            momentum = self.state[parameters[0]].setdefault("momentum", torch.zeros_like(gradients))
            momentum.lerp_(gradients, 1 - group["momentum"])
            update = orthogonalise(gradients.lerp(momentum, group["momentum"]))
            rate = group["lr"] * max(1, update.shape[1] / update.shape[2]) ** 0.5
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list((-rate * update).unflatten(2, shape[1:]).unbind()))
