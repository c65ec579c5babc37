"""What `sample(callback=)` may be: the trajectory, and inpainting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..kernels.spec import compute_dtype
from ..noise import Noise
from ..primitives import weighted_sum
from .base import Sampler

KNOWN_TAG = 0x6B6E6F776E  # "known"


class Trajectory:
    """Keeps what a sampler comes to: x and x0, a tensor of each look, in the dtype of the arithmetic; of a chain x.

    path = df.samplers.Trajectory(); ddim.sample(net, x_T, noise, callback=path); path.x[-1]
    """

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.x0: list[Tensor] = []

    def __call__(self, i: int, *seen: Any) -> None:
        """Keeps them; at look 0 it starts anew. seen: t, x and x0, or of a chain x."""
        if i == 0:
            self.x, self.x0 = [], []
        self.x.append(seen[-2] if len(seen) > 1 else seen[0])
        self.x0 += seen[2:]

    def __repr__(self) -> str:
        return f"Trajectory(<{len(self.x)} looks>)"


class Inpainting:
    """After each step x becomes mask * (alpha_s*known + sigma_s*z) + (1 - mask) * x, s the level it came to.

    sampler: whose `sample` it is the callback of      known: like x_T, the data where the mask is 1
    mask: bool, or floating in [0, 1], broadcastable to known
    noise: z of the step from level t is
        noise.fold_in(KNOWN_TAG).fold_in(t)
    The known region is noised and mixed in by one launch, which stores no noise.
    Raises TypeError or ValueError for others. Lugmayr et al. 2022 (RePaint), eq. 8; its jumps are RePaint's.
    """

    def __init__(self, sampler: Sampler, known: Tensor, mask: Tensor, noise: Noise) -> None:
        op = type(self).__name__
        checks.instance(Sampler, "a Sampler")(op, "sampler", sampler)
        checks.samples(op, "known", known)
        if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype in checks.DTYPES):
            got = mask.dtype if isinstance(mask, Tensor) else checks.kind_of(mask)
            raise TypeError(f"{op}: mask must be a bool or floating tensor, got {got}")
        checks.instance(Noise, "a Noise")(op, "noise", noise)
        try:
            wide = mask.to(compute_dtype(known.dtype)).expand(known.shape).contiguous()
        except RuntimeError:
            raise ValueError(
                f"{op}: mask must be broadcastable to {tuple(known.shape)}, got {tuple(mask.shape)}"
            ) from None
        # As the loop's x is, and each in one piece: a plain call.
        self.known, self.mask, self.noise = known.to(wide.dtype), wide, noise.fold_in(KNOWN_TAG)
        self._levels, self._tags = sampler.reached(), sampler.levels

    def __call__(self, i: int, t: float, x: Tensor, x0: Tensor) -> Tensor:
        level = self._levels[i]
        terms: list[tuple[Any, Any]] = [(level.alpha, self.known.to(x.dtype))]
        if level.sigma:
            terms.append((level.sigma, self.noise.fold_in(self._tags[i])))
        made: Tensor = weighted_sum(*terms, where=self.mask, otherwise=x)
        return made

    def __repr__(self) -> str:
        return f"Inpainting(<{tuple(self.known.shape)}>)"
