"""RePaint: inpainting that goes back up the levels, for the painted part to agree with the known one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..kernels.spec import compute_dtype
from ..noise import Noise
from ..primitives import weighted_sum
from .arguments import Network, Start
from .base import Asked, Callback, Sampler
from .callbacks import Inpainting
from .network import bound
from .running import called_back, narrowed, progressed
from .start import check_start

JUMP_TAG = 0x6A756D70  # "jump"; the stream whose fold_in(r) is that of repetition r
UP_TAG = 0x7570  # "up"
MOST = 1000


class RePaint(Inpainting):
    """Inpainting with jumps: from every `jump_length`th level back up as many, and down again.

    sampler, known, mask, noise: as in Inpainting; a sampler whose step reads x and the network's prediction alone
    jump_length: j >= 1, levels      jump_n_sample: r in [1, 1000], how often j levels are gone down; 1: Inpainting
    looks: of the sampler, in the order in which they are made
    Up is x_t = alpha_t/alpha_s x_s + sqrt(sigma_t^2 - (alpha_t/alpha_s sigma_s)^2) z, the j levels in one launch. All
    noise of repetition k > 0 is of the streams noise.fold_in(JUMP_TAG).fold_in(k), so none is drawn twice, and the
    first time down is Inpainting's. Raises TypeError or ValueError for others.
    Lugmayr et al. 2022 (RePaint), algorithm 1 and its code, of which r and j have their names.
    """

    def __init__(
        self,
        sampler: Sampler,
        known: Tensor,
        mask: Tensor,
        noise: Noise,
        *,
        jump_length: int = 10,
        jump_n_sample: int = 10,
    ) -> None:
        super().__init__(sampler, known, mask, noise)
        op = type(self).__name__
        length = checks.integer(op, "jump_length", jump_length, 1)
        times = checks.integer(op, "jump_n_sample", jump_n_sample, 1, MOST)
        if any(look.reads for look in sampler._plan.launches.looks):
            raise ValueError(
                f"{op}: sampler must step from x and the prediction alone (DDPM, DDIM, EulerAncestral), got {sampler}"
            )
        self.sampler = sampler
        self.looks = looks_of(len(sampler.levels), length, times)
        self._painters = [copy.copy(self) for _ in range(times)]
        for k, painter in enumerate(self._painters):
            painter.noise = repetition(self.noise, k)
        stops = [(float(stop.alpha), float(stop.sigma)) for stop in sampler.stops()]
        self._up = [raising(*stop, *end) for stop, end in zip(stops, stops[length:], strict=False)]

    @torch.no_grad()
    def sample(
        self,
        net: Network,
        x: Start,
        noise: Noise,
        *,
        net_arguments: Mapping[str, Any] | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Tensor:
        """The sampler's loop with its jumps: net(x, t) and a step for each of `looks`, the known part after each.

        Arguments, result and errors as in the sampler's `sample`; callback(n, t, x, x0) is called after the nth of
        `looks`, with what was painted.
        """
        op, sampler = type(self).__name__, self.sampler
        net = bound(op, net, net_arguments, False)
        checks.function(op, sampler.net_name, net)
        checks.instance(Noise, "a Noise")(op, "noise", noise)
        if callback is not None:
            checks.function(op, "callback", callback)
        if not isinstance(x, Tensor):
            x = sampler.start(x, noise)
        check_start(op, x, noise)
        checks.like(op, "x", x, "known", self.known)
        sampler._check_batch(x)
        dtype, plan = x.dtype, sampler._plan
        x = x.to(compute_dtype(dtype))
        asked, table, x0 = Asked(net, dtype, True), sampler._table(x), torch.zeros_like(x)
        visits, last = [0] * len(plan.told), -1
        for n, i in enumerate(progressed(self.looks, checks.flag(op, "progress", progress), op)):
            stream = repetition(noise, visits[i])
            if i <= last:
                kept, spread = self._up[i]
                x = weighted_sum((kept, x), (spread, stream.fold_in(UP_TAG).fold_in(plan.tags[i])))
            estimate = x0 if sampler.self_condition else None
            x, _, x0 = sampler._looked(asked, i, x, (), stream, table, estimate)
            x = self._painters[visits[i]](i, plan.told[i], x, x0)
            if callback is not None:
                x = called_back(op, callback, x, n, plan.told[i], x, x0)
            visits[i] += 1
            last = i
        return narrowed(op, x, dtype)

    def __repr__(self) -> str:
        return f"RePaint(<{tuple(self.known.shape)}>, {len(self.looks)} looks)"


def looks_of(N: int, length: int, times: int) -> tuple[int, ...]:
    """N looks, each stretch of `length` of them, counted from the last, made `times` times."""
    left = {N - 1 - j: times - 1 for j in range(0, N - length, length)}  # jumps from where so many looks are done
    found: list[int] = []
    done = 0
    while done < N:
        found.append(done)
        done += 1
        if left.get(done, 0):
            left[done] -= 1
            done -= length
    return tuple(found)


def repetition(noise: Noise, k: int) -> Noise:
    return noise.fold_in(JUMP_TAG).fold_in(k) if k else noise


def raising(alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> tuple[float, float]:
    """Of q(x_t | x_s): what multiplies x_s, and the noise."""
    ratio = alpha_t / alpha_s
    return ratio, max(sigma_t**2 - (ratio * sigma_s) ** 2, 0.0) ** 0.5
