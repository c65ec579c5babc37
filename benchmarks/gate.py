"""The correctness gate: no speed is reported for a peer whose results are wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import dae_fast as df

from . import external
from .environment import CPU
from .peers import Setting, Tensors, results, this_step


class WrongResultError(Exception):
    """A peer's results are not those of the case."""


class Gate:
    """The judge of one setting: the case's plain formula in fp64 on its device, given our noise of the CPU."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.right = self._plain(wide=True)
        self.usual = self._plain(wide=False)

    def _plain(self, *, wide: bool) -> Tensors:
        setting, case = self.setting, self.setting.case
        inputs, dtype = setting.inputs(wide=wide), torch.float64 if wide else setting.dtype
        shape_alone = {case.tensors[0]: torch.empty(setting.shape, dtype=setting.dtype, device=CPU)}
        eps = case.eps({**this_step(inputs), **shape_alone}, dtype)
        eps = eps.to(setting.device) if isinstance(eps, Tensor) else eps
        leaves = [inputs[name] for name in setting.leaves]
        return results(lambda: case.plain(inputs, eps), leaves, setting.dtype)()

    def check(self, name: str, peer: Callable[[], Tensors]) -> Tensors:
        """The peer's results; raises WrongResultError if they are not right."""
        outputs = peer()
        got = tuple(output.detach() for output in outputs)
        if [g.shape for g in got] != [r.shape for r in self.right]:
            shapes = [tuple(g.shape) for g in got], [tuple(r.shape) for r in self.right]
            raise WrongResultError(f"{name}: {self.setting}: results of shapes {shapes[0]}, not {shapes[1]}")
        # Peers that draw their own noise can be held to its statistics only.
        other_noise = self.setting.case.fresh and name not in df.backend_names()
        for k, (g, right, usual) in enumerate(zip(got, self.right, self.usual, strict=True)):
            wrong = self._moments_differ(g, right) if other_noise else self._elements_differ(name, g, right, usual)
            if wrong:
                raise WrongResultError(f"{name}: {self.setting}: result {k} is wrong: {wrong}")
        return outputs

    def _elements_differ(self, name: str, got: Tensor, right: Tensor, usual: Tensor) -> str:
        """At most twice plain torch's error in the same dtype, and a few units in the last place.

        Those are for sums, where plain torch may be exact by luck; the tests are stricter. The judge of fp64 is
        no more exact than what it judges: there the units are those of the largest result. Other libraries
        are allowed what the fp32 in which they make their tables costs.
        """
        ulp = torch.finfo(self.setting.dtype).eps
        size = right.abs().max() if self.setting.dtype == torch.float64 else right.abs()
        allowed = 2 * (usual.double() - right).abs().max() + 8 * ulp * size
        if name in {library.name for library in external.LIBRARIES}:
            allowed = allowed + external.TABLE_ERROR * right.abs().max()
        error = (got.double() - right).abs()
        bad = ~(error <= allowed)  # NaN is bad too
        return f"{int(bad.sum())} elements, the largest error is {error.max():.3g}" if bad.any() else ""

    def _moments_differ(self, got: Tensor, right: Tensor) -> str:
        first = self.setting.case.first(self.setting.inputs())
        draws = min(right.numel() if right.dim() else first.numel(), self.setting.case.law.draws(first))
        size = right.square().mean().sqrt()
        allowed = (10 / draws**0.5 + 4 * torch.finfo(self.setting.dtype).eps) * size
        wide = got.double()
        mean, rms = wide.mean(), wide.square().mean().sqrt()
        if (mean - right.mean()).abs() <= allowed and (rms - size).abs() <= allowed:
            return ""
        return f"mean {mean:.3g} and rms {rms:.3g}, expected {right.mean():.3g} and {size:.3g}"
