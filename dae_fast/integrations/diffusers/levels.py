"""The levels of a scheduler's add_noise and get_velocity: found on the device, and each op one launch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...coefficients import Level
from ...primitives import LevelOp
from ...schedule import Schedule
from .facts import Facts
from .kinds import Kind

ADD_NOISE = LevelOp("add_noise", lambda alpha, sigma: {"sample": alpha, "noise": sigma})
VELOCITY = LevelOp("get_velocity", lambda alpha, sigma: {"noise": alpha, "sample": -sigma})


class Levels:
    """All levels of a scheduler in order of their noise, and where each of upstream's places stands among them."""

    def __init__(self, f: Facts, kind: Kind) -> None:
        alpha, sigma = kind.columns(f)
        order = np.argsort(np.arctan2(sigma, alpha), kind="stable")
        self.rank = np.argsort(order)
        self.in_order = bool((order == np.arange(len(order))).all())
        self.schedule = Schedule(torch.from_numpy(alpha[order]), torch.from_numpy(sigma[order]), name="add_noise")
        self._on: dict[torch.device, Tensor] = {}

    @staticmethod
    def of(f: Facts, kind: Kind) -> Levels:
        if kind not in f.levels:
            f.levels[kind] = Levels(f, kind)
        made: Levels = f.levels[kind]
        return made

    def at(self, place: int | Tensor, device: torch.device) -> Level:
        """Of a place, or of a tensor of them; one that is len(levels) becomes NaN, on a GPU."""
        if not isinstance(place, Tensor):
            return self.schedule[int(self.rank[place])]
        place = place.reshape(-1)
        if self.in_order:
            return self.schedule[place]
        if device not in self._on:
            self._on[device] = torch.from_numpy(np.append(self.rank, len(self.rank))).to(device)
        return self.schedule[self._on[device][place]]


def places(kind: Kind, known: Tensor, timesteps: Tensor) -> Tensor:
    """Where each of `timesteps` (B,) stands in `known`, by upstream's rule: the second place of those that stand twice.

    One that stands nowhere is the last step's for kinds that say so, else an IndexError, or len(known) on a GPU, which
    is not waited for.
    """
    found = known == timesteps[:, None]
    second = found.sum(1).clamp(max=2)[:, None]
    index = (found.cumsum(1) >= second).int().argmax(1)
    missing = second[:, 0] == 0
    if kind.elsewhere_last:
        return index.masked_fill(missing, len(known) - 1)
    if missing.device.type == "cpu" and missing.any():
        raise IndexError(f"timestep {timesteps[missing][0].item()} is none of scheduler.timesteps")
    return index.masked_fill(missing, len(known) + 1)
