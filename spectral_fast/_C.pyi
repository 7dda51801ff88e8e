import numpy as np
from numpy.typing import NDArray

def jacobi_svd(
    m: NDArray[np.float64],
    wt: NDArray[np.float64],
    s: NDArray[np.float64],
    status: NDArray[np.int32],
    threads: int,
) -> None: ...
