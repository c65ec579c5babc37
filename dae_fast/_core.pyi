"""The extension module of csrc/bind.cpp. None is absent; tensors are checked by the caller."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .noise import Noise

def affine(
    x: Tensor | None,
    y: Tensor | None,
    z: Tensor | None,
    w: Tensor | None,
    noise: Noise | None,
    raw: bool,
    table: Tensor,
    index: Tensor | None,
    columns: Sequence[int],
    clamp: tuple[int, int, int, float, float] | None,
    out: Tensor,
    out2: Tensor | None,
    /,
) -> int: ...
def residual(
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    table: Tensor,
    index: Tensor | None,
    columns: Sequence[int],
    kind: int,
    mask: Tensor | None,
    mask_noise: Noise | None,
    thresholds: Tensor | None,
    keeps: bool,
    kept: Tensor | None,
    weight: Tensor | None,
    upstream: Tensor | None,
    only_if_scaled: bool,
    reduction: int,
    per_sample: Tensor | None,
    loss: Tensor | None,
    also: Tensor | None,
    grad: Tensor | None,
    sums: Tensor | None,
    counter: Tensor | None,
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
def load_cuda(path: str, /) -> None: ...
def cuda_devices() -> int: ...
def on_gpu(tensor: Tensor, /) -> bool: ...
def plain_affine(
    op: str,
    columns: tuple[int, ...],
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    name: str | int | Tensor | None,
    source: Any,
    w: Tensor | None,
    clamp: tuple[int, int, int, float, float] | None,
    /,
) -> Any: ...
def plain_loss(
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    columns: tuple[int, ...],
    kind: int,
    reduction: int,
    name: str | None,
    source: Any,
    scratch: Callable[[torch.device, int], tuple[Tensor, Tensor]],
    /,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | int | None] | None: ...
def is_one(upstream: Tensor, /) -> bool: ...
def use_plain(on_cpu: Any, on_gpu: Any, /) -> None: ...
def use_gradients(function: Callable[..., Any], /) -> None: ...
def pretend_gpu(yes: bool, /) -> None: ...

nvtx_built: bool

def nvtx_listens() -> bool: ...
def nvtx_push(name: str, bytes: int, /) -> None: ...
def nvtx_pop() -> None: ...
