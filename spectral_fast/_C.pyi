import numpy as np
from numpy.typing import NDArray

def isa() -> dict[str, str | list[str]]: ...
def lowrank_svd(
    modules: NDArray[np.int64],
    out: NDArray[np.float64],
    quality: NDArray[np.float64],
    status: NDArray[np.int32],
    threads: int,
    vectors: bool = True,
) -> None: ...
def recompose(factors: NDArray[np.int64], finite: NDArray[np.bool_], threads: int) -> None: ...
def segment_products(
    p: int,
    q: int,
    dtype: int,
    starts: NDArray[np.int64],
    out: NDArray[np.float32],
    threads: int,
) -> None: ...
def top_logits(
    logits: int,
    dtype: int,
    vocabulary: int,
    labels: NDArray[np.int64],
    logsumexp: NDArray[np.float32],
    gold: NDArray[np.float32],
    values: NDArray[np.float32],
    ids: NDArray[np.int64],
    threads: int,
) -> None: ...
def tensor_sketch(
    hidden: int,
    dtype: int,
    logsumexp: NDArray[np.float32],
    gold: NDArray[np.float32],
    values: NDArray[np.float32],
    ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    bucket_h: NDArray[np.int32],
    sign_h: NDArray[np.float32],
    bucket_e: NDArray[np.int32],
    sign_e: NDArray[np.float32],
    z: NDArray[np.float32],
    threads: int,
) -> None: ...
def jacobi_svd(
    m: NDArray[np.float64],
    wt: NDArray[np.float64],
    s: NDArray[np.float64],
    vt: NDArray[np.float64],
    status: NDArray[np.int32],
    threads: int,
) -> None: ...
def frequent_directions(
    basis: NDArray[np.float64],
    squares: NDArray[np.float64],
    z: NDArray[np.float64],
    out: NDArray[np.float64],
    out_squares: NDArray[np.float64],
) -> float: ...
def spline(
    x: int,
    y: int,
    out: int,
    x_dtype: int,
    y_dtype: int,
    count: int,
    values: NDArray[np.float64],
    constants: tuple[float, float, float, float, float],
    shape: tuple[bool, bool, bool],
    sums: NDArray[np.float64] | None,
    threads: int,
) -> None: ...
