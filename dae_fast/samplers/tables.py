"""Coefficients of the steps, for all levels at once in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.parameterisation import Parameterisation, check_name, conversion
from ..schedule import Schedule


def reverse_table(
    op: str, schedule: Schedule, levels: list[int], predict: Parameterisation, eta: float, large: bool
) -> Tensor:
    """(steps, 5) float64: c_x, c_m, c_z and the two coefficients of the x0 estimate, for each step t to s.

    The last s is the data: alpha_s = 1, sigma_s = 0.
    """
    alpha, sigma = schedule.alpha[levels], schedule.sigma[levels]
    table = torch.cat(
        (reverse(alpha, sigma, *following(alpha, sigma), eta, large), estimate(op, predict, alpha, sigma)), 1
    )
    schedule._require_finite(op, table, levels)
    return table


def following(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of the level after each, the data after the last."""
    return torch.cat((alpha[1:], alpha.new_ones(1))), torch.cat((sigma[1:], sigma.new_zeros(1)))


def reverse(
    alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, eta: float = 0.0, large: bool = False
) -> Tensor:
    """(steps, 3): x_s = c_x * x_t + c_m * x0_hat + c_z * z.

    q(x_t | x_s) has variance v = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2 and the posterior's is
    v sigma_s^2/sigma_t^2 (Kingma et al. 2021). The step keeps the direction x_t - alpha_t x0_hat as far
    as x_s must have variance sigma_s^2.
    """
    v = (sigma_t.square() - (alpha_t / alpha_s * sigma_s).square()).clamp(min=0)
    ratio = torch.where(sigma_s > 0, sigma_s / sigma_t, 0.0)
    added = torch.minimum(eta * v.sqrt() * ratio, sigma_s)
    keep = (sigma_s.square() - added.square()).clamp(min=0).sqrt()
    c_x = torch.where(sigma_s > 0, keep / sigma_t, 0.0)
    c_z = torch.where(sigma_s > 0, v.sqrt() if large else added, 0.0)
    return torch.stack((c_x, alpha_s - c_x * alpha_t, c_z), -1)


def estimate(op: str, predict: Parameterisation, alpha: Tensor, sigma: Tensor) -> Tensor:
    """(steps, 2): x0_hat = a_x * x_t + a_p * prediction."""
    check_name(op, "predict", predict)
    if predict == "x0":
        return torch.stack((torch.zeros_like(alpha), torch.ones_like(alpha)), -1)
    return torch.stack(conversion(predict, "x0")(alpha, sigma), -1)
