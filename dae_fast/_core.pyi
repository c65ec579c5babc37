"""The pybind11 module of csrc/bind.cpp. Tensors are addresses; 0 is absent."""

from collections.abc import Sequence

_Noise = tuple[int, int, int, int, int, int]
_Table = tuple[int, int, int, int, bool]
_Layout = tuple[Sequence[int], Sequence[Sequence[int]]] | None

def affine(
    dtype: int,
    B: int,
    D: int,
    x: int,
    y: int,
    z: int,
    out: int,
    out2: int,
    noise: _Noise,
    table: _Table,
    columns: Sequence[int],
    clamp: tuple[int, int, float, float] | None,
    layout: _Layout,
    /,
) -> int: ...
def residual(
    dtype: int,
    B: int,
    D: int,
    pred: int,
    y: int,
    z: int,
    mask: int,
    grad: int,
    noise: _Noise,
    table: _Table,
    columns: Sequence[int],
    weight: int,
    upstream: float,
    reduction: int,
    per_sample: int,
    loss: int,
    layout: _Layout,
    /,
) -> int: ...
def row_dots(
    dtype: int, B: int, D: int, g: int, x: int, y: int, z: int, noise: _Noise, out: int, layout: _Layout, /
) -> None: ...
def bits(B: int, D: int, noise: _Noise, out: int, /) -> None: ...
def fold_in(seed: int, offset: int, data: int, /) -> tuple[int, int]: ...
def philox4x32_10(counter: Sequence[int], key: Sequence[int], /) -> list[int]: ...
def box_muller(radius: int, angle: int, z: int, n: int, /) -> None: ...
def use_isa(name: str, /) -> None: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def max_threads() -> int: ...
