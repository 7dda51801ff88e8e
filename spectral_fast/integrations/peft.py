"""PEFT's own functions by the compact route: `with fast_svd(): ...`, or `enable()` and `disable()`.

`add_weighted_adapter` (svd), `convert_to_lora` and `save_as_lora` (of LoRA, VeRA, DeLoRA, VB-LoRA, LoHa and LoKr),
and the last step of `reduce_intruder_dimension` form each layer's ΔW and take its dense SVD; from the factors the
same takes milliseconds. Everything else stays with PEFT: other combinations, clamping, drivers, convolutions, updates
of high rank. So does the conversion of PiSSA, OLoRA and the like to LoRA (`path_initial_model_for_weight_conversion`),
which joins factors and takes no SVD at all.

What changes is the code inside of PEFT's functions; the functions stay the objects that they are, so that a name
which was imported long before has the new inside, too, and gets its own back.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from types import CodeType, FunctionType
from typing import Any

from spectral_fast.integrations.peft_svd import find, originals

__all__ = ["disable", "enable", "enabled", "fast_svd"]

WRITTEN_FOR = "0.21.2"


# The new insides. They run among the globals of PEFT's modules, and have the names and parameters of its functions.


def _svd_generalized_task_arithmetic_weighted_adapter(  # type: ignore[no-untyped-def]
    self,
    combination_type,
    adapters,
    weights,
    new_rank,
    target,
    target_lora_A,
    target_lora_B,
    density,
    majority_sign_method,
    clamp=None,
    full_matrices=True,
    driver=None,
):
    from spectral_fast.integrations import peft_svd

    others = {
        "target_lora_A": target_lora_A,
        "target_lora_B": target_lora_B,
        "density": density,
        "majority_sign_method": majority_sign_method,
        "clamp": clamp,
        "full_matrices": full_matrices,
        "driver": driver,
    }
    return peft_svd.merged(self, combination_type, adapters, weights, new_rank, target, others)


def _convert_module_to_lora(module, rank, adapter_name="default"):  # type: ignore[no-untyped-def]
    from spectral_fast.integrations import peft_svd

    return peft_svd.converted(module, rank, adapter_name)


def _reduce_intruder_dimension(  # type: ignore[no-untyped-def]
    peft_model,
    old_adapter_name="default",
    new_adapter_name="intruder_reduced",
    top_k=10,
    threshold_epsilon=0.5,
    mitigation_lambda=0.75,
    logging_sink=print,
):
    from spectral_fast.integrations import peft_svd

    return peft_svd.reduced(
        peft_model, old_adapter_name, new_adapter_name, top_k, threshold_epsilon, mitigation_lambda, logging_sink
    )


INSIDES: dict[str, Callable[..., Any]] = {
    "peft.tuners.lora.model:LoraModel._svd_generalized_task_arithmetic_weighted_adapter": (
        _svd_generalized_task_arithmetic_weighted_adapter
    ),
    "peft.tuners.lora.conversion:_convert_module_to_lora": _convert_module_to_lora,
    "peft.tuners.lora.intruders:reduce_intruder_dimension": _reduce_intruder_dimension,
}
# SHA-256 of the sources that the compact route stands for: what is replaced, what calls it, and what forms the updates.
SOURCES = {
    "peft.tuners.lora.model:LoraModel._svd_generalized_task_arithmetic_weighted_adapter": (
        "7697cacc870c0faa7b5e4a53a2eff2e7a17010c30789c50217ed8bc5fec9d1ca"
    ),
    "peft.tuners.lora.conversion:_convert_module_to_lora": (
        "5ab693ab10c49691b13cb24b49e7a9c28529ee0d66850b1379b5b49a110bd770"
    ),
    "peft.tuners.lora.intruders:reduce_intruder_dimension": (
        "3f1253f8d6e3f713706e502da6b44853ef4e9f0bd920abbc7c47600232d203f4"
    ),
    "peft.tuners.lora.model:LoraModel.add_weighted_adapter": (
        "1fd8e1942caa0bdf09dd938bbc99b21d22e20b823d442588e6e6c65c178961b5"
    ),
    "peft.tuners.lora.conversion:convert_to_lora": ("1a3d9733268ab1c8f74f9680c232cf3be6d489c7cee17a055dbd3de8ef44007d"),
    "peft.tuners.lora.conversion:_find_cutoff_index": (
        "66c312419004de5e82a64b43453dd3cc6b585992fab481b5a10e16b7fdf38601"
    ),
    "peft.utils.merge_utils:task_arithmetic": ("5e81850003c4db2d081c887d16f22816446ec1340d0454a10fef907c96246b74"),
    "peft.tuners.lora.layer:Embedding.get_delta_weight": (
        "3090c66d5ead1d6e3ef5bafb289fe2511cd5c0bac9a84200a921764559bdfc6c"
    ),
    "peft.tuners.lora.layer:Linear.get_delta_weight": (
        "afd956819a7fa73f7d25c792c70481e7f1367084a6f9622f3825f99c5cebd0e1"
    ),
    "peft.tuners.vera.layer:Linear.get_delta_weight": (
        "a215550ac32881068d63c3f0fc7ea393cae6e2ec0c258376bbe5c91d82ec1fe6"
    ),
    "peft.tuners.delora.layer:DeloraLayer.get_delta_weight": (
        "0634b9bb5a1908f69dc2b7da15d2b0cfba561e88b0423ceb043013a18019c8c1"
    ),
    "peft.tuners.vblora.layer:Linear.get_delta_weight": (
        "0a92509c55be7ce322d9ba38527fcd34730801ff68cfe5ba2d0fcc130f2157f8"
    ),
    "peft.tuners.loha.layer:LoHaLayer.get_delta_weight": (
        "bd821d19f84643653340e557e0f61e1bbbff39eedd3e39b3179ef90fd2223923"
    ),
    "peft.tuners.lokr.layer:LoKrLayer.get_delta_weight": (
        "c575bb96e432d1a1a733ee54fcfcf2906b1b9f703c40fee25102d0e6181e05ab"
    ),
    "peft.tuners.delora.layer:DeloraLayer._compute_delta": (
        "7c7da84712ec1a5727b630ec3ea8c45b6a44a584c32fa5fdeaebcbcbf23cb3b2"
    ),
}

_lock = Lock()
_wanted = False  # by enable()
_depth = 0  # of fast_svd(), over all threads
_own: dict[FunctionType, CodeType] = {}  # the very functions: whoever else exchanges names of PEFT's gets none of it


def enable() -> None:
    """Give PEFT's functions the compact inside, in all threads, until `disable`; once is as good as twice.

    Raises:
        ImportError: there is no PEFT.
        RuntimeError: PEFT's functions are not those that this was written for, or their sources are not installed;
            nothing is changed then.
    """
    global _wanted
    with _lock:
        _switch_on()
        _wanted = True


def disable() -> None:
    """Give PEFT's functions their own inside back, but for blocks of `fast_svd` that have not ended."""
    global _wanted
    with _lock:
        _wanted = False
        _switch_off()


def enabled() -> bool:
    """Whether PEFT's functions have the compact inside now."""
    return bool(_own)


@contextmanager
def fast_svd() -> Iterator[None]:
    """PEFT's functions with the compact inside while the block runs, in all threads; blocks may be nested and overlap.

    Raises:
        As `enable`.
    """
    global _depth
    with _lock:
        _switch_on()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            _switch_off()


def _switch_on() -> None:
    if _own:
        return
    functions = {path: _plain(function) for path, function in _check().items() if path in INSIDES}
    for function in functions.values():
        _own[function] = function.__code__
        originals[function.__name__] = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
    for path, function in functions.items():
        function.__code__ = _plain(INSIDES[path]).__code__


def _switch_off() -> None:
    if _wanted or _depth:
        return
    for function, code in _own.items():
        function.__code__ = code
    # A call that another thread is in the midst of may still ask for them: `originals` stay.
    _own.clear()


def _plain(function: Callable[..., Any]) -> FunctionType:
    """The function itself, of one with decorators such as `torch.no_grad`."""
    inner = inspect.unwrap(function)
    assert isinstance(inner, FunctionType)
    return inner


def _check() -> dict[str, Callable[..., Any]]:
    """PEFT's functions that the compact route stands for, if they are those that it was written for."""
    import peft

    found, odd = {}, []
    for path, expected in SOURCES.items():
        try:
            found[path] = find(path)
            same = source_hash(found[path]) == expected
        except (ImportError, AttributeError, TypeError):  # it is gone, or no function
            same = False
        except OSError as error:
            raise RuntimeError(
                f"PEFT {peft.__version__} is installed without its sources, by which its functions are known: {path} "
                f"has none. Use PEFT as it is, or install version {WRITTEN_FOR} with its .py files"
            ) from error
        if not same:
            odd.append(path)
    if odd:
        raise RuntimeError(
            f"PEFT {peft.__version__} does not have the insides of PEFT {WRITTEN_FOR}, for which the compact route was "
            f"made: {odd[0]} differs{f', and {len(odd) - 1} others do' if len(odd) > 1 else ''}. Use PEFT as it is, or "
            f"version {WRITTEN_FOR}"
        )
    return found


def source_hash(function: Callable[..., Any]) -> str:
    """SHA-256 of a function's source, decorators included: the same in all versions of Python."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
