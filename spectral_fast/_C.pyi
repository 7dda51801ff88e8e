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
def jacobi_svd(
    m: NDArray[np.float64],
    wt: NDArray[np.float64],
    s: NDArray[np.float64],
    vt: NDArray[np.float64],
    status: NDArray[np.int32],
    threads: int,
) -> None: ...
