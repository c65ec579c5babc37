"""The extension module of csrc/bind.cpp and call.cpp. None is absent; tensors are checked by the caller."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .noise import Noise

Inputs = tuple[Tensor | None, ...]

ENUMERATIONS: dict[str, tuple[str, ...]]

class Map:
    def __init__(
        self, op: str, columns: tuple[int, ...], inner: tuple[int, ...] | None, slots: tuple[int, ...], owner: Any, /
    ) -> None: ...

class Loss:
    def __init__(self, kind: int, reduction: int, columns: tuple[int, ...], /) -> None: ...

def affine(
    map: Map,
    inputs: Inputs,
    noise: Noise | Tensor | None,
    raw: bool,
    table: Tensor,
    index: Tensor | None,
    bounds: tuple[float, float] | None,
    out: Tensor,
    out2: Tensor | None,
    /,
) -> int: ...
def residual(
    loss: Loss,
    operands: tuple[Any, ...],
    table: Tensor,
    index: Tensor | None,
    drawn: tuple[Any, ...],
    mask: Tensor | None,
    factors: Inputs,
    only_if_scaled: bool,
    results: Inputs,
    room: Inputs,
    /,
) -> int: ...
def row_dots(
    g: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    out: Tensor,
    sums: Tensor | None,
    counter: Tensor | None,
    /,
) -> None: ...
def mask_count(
    mask: Tensor,
    mask_noise: Noise | None,
    thresholds: Tensor | None,
    keeps: bool,
    upstream: Tensor | None,
    kept: Tensor,
    sums: Tensor | None,
    counter: Tensor | None,
    /,
) -> None: ...
def corrupt(x: Tensor, noise: Noise, thresholds: Tensor, low: float, high: float, out: Tensor, /) -> None: ...
def gaussian(
    mu: Tensor,
    log_var: Tensor,
    eps: Tensor | None,
    noise: Noise | None,
    z: Tensor,
    kl: Tensor,
    sums: Tensor | None,
    counter: Tensor | None,
    /,
) -> None: ...
def gaussian_grad(
    mu: Tensor,
    log_var: Tensor,
    eps: Tensor | None,
    noise: Noise | None,
    z_grad: Tensor | None,
    kl_grad: Tensor | None,
    mu_grad: Tensor,
    log_var_grad: Tensor,
    /,
) -> None: ...
def chain(
    x: Tensor,
    means: Tensor,
    precisions: Tensor,
    log_weights: Tensor,
    step: float,
    spread: float,
    steps: int,
    noise: Any,
    out: Tensor,
) -> None: ...
def well_chain(
    x: Tensor, slope: float, square: float, step: float, spread: float, steps: int, noise: Any, out: Tensor
) -> None: ...
def normal_sum(noise: Any, nodes: Sequence[int], weights: Sequence[float], out: Tensor) -> None: ...
def bits(noise: Noise, raw: bool, below: int, out: Tensor, /) -> None: ...
def fold_in(seed: int, offset: int, data: int, /) -> tuple[int, int]: ...
def fold_in_tensor(noise: Noise, data: Tensor | int, out: Tensor, /) -> None: ...
def scratch_doubles(B: int, D: int, columns: int, /) -> int: ...
def philox4x32_10(counter: Sequence[int], key: Sequence[int], /) -> list[int]: ...
def box_muller(radius: int, angle: int, z: int, n: int, /) -> None: ...
def use_isa(name: str, /) -> None: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def max_threads() -> int: ...
def load_cuda(path: str | None, /) -> None: ...
def cuda_devices() -> int: ...
def on_gpu(tensor: Tensor, /) -> bool: ...
def fast_map(
    map: Map, given: tuple[Any, ...], source: Any, key: Any, bounds: tuple[float, float] | None, out: Tensor | None, /
) -> Any: ...
def fast_step(
    looks: list[Any] | None,
    tables: Any,
    history: tuple[Tensor, ...],
    i: Any,
    x: Any,
    pred: Any,
    noise: Any,
    /,
) -> tuple[Tensor, tuple[Tensor, ...]] | None: ...
def fast_loss(
    loss: Loss,
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    source: Any,
    key: Any,
    weight: Tensor | None,
    scratch: Callable[[torch.device, int], tuple[Tensor, Tensor]],
    /,
) -> tuple[Tensor, Tensor | None, Tensor | None, Any, Tensor | int | None] | None: ...
def all_within(values: Tensor, low: float, high: float, /) -> bool | None: ...
def is_one(upstream: Tensor, /) -> bool: ...
def use_fast(on_cpu: Any, on_gpu: Any, /) -> None: ...
def use_gradients(function: Callable[..., Any], /) -> None: ...

nvtx_built: bool

def nvtx_listens() -> bool: ...
def nvtx_push(name: str, bytes: int, /) -> None: ...
def nvtx_pop() -> None: ...
