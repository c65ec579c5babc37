"""Coefficients of the steps, for all levels at once in float64."""

from __future__ import annotations

from collections.abc import Callable

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


def estimate(op: str, predict: Parameterisation, alpha: Tensor, sigma: Tensor, to: Parameterisation = "x0") -> Tensor:
    """(steps, 2): `to`, x0_hat, = a_x * x_t + a_p * prediction."""
    check_name(op, "predict", predict)
    return torch.stack([torch.zeros_like(alpha) + c for c in conversion(predict, to)(alpha, sigma)], -1)


# The variables r, tau in which x/r of a straight path x_t = alpha*x0 + sigma*eps moves at a constant slope: eps
# (Karras et al. 2022), or eps - x0 (Lipman et al. 2023).
STRAIGHT: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda alpha, sigma: (alpha, sigma / alpha),
    "flow": lambda alpha, sigma: (alpha + sigma, sigma / (alpha + sigma)),
}
Place = tuple[Tensor, Tensor]  # alpha and sigma


def corrected(slope: str, of: Parameterisation, t: Place, m: Place, s: Place) -> Tensor:
    """(steps, 3): x_s = c_x * x_m + c_m * y + c_z * x_t, x_m where the Euler step from t leads.

    y: what is read at x_m, `of` says what: "x0", or a prediction
    With c = (tau_m - tau_t)/(tau_s - tau_t), h = tau_s - tau_t and k the slope, in x/r:
    x_s = x_t + h * ((1 - 1/2c) * k_t + 1/2c * k_m), of second order: Heun for c = 1, midpoint for c = 1/2
    (the two-stage Runge-Kutta family). k_t is not read again: it is (x_m - x_t)/(c*h).
    """
    (r_t, tau_t), (r_m, tau_m), (r_s, tau_s) = (STRAIGHT[slope](*place) for place in (t, m, s))
    h = tau_s - tau_t
    c = (tau_m - tau_t) / h
    of_m = (1 - 1 / (2 * c)) / c
    from_x, from_y = (h / (2 * c) * k for k in conversion(of, slope)(*m))
    return torch.stack((r_s * (of_m / r_m + from_x), r_s * from_y, r_s * (1 - of_m) / r_t), -1)
