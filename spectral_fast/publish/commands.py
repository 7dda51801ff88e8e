"""Command lines that repeat what a record tells."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import Any

from spectral_fast.calibration.options import DTYPES, CalibrationOptions
from spectral_fast.options import flag_name
from spectral_fast.publish.paths import in_command

_DTYPES = {dtype: flag for flag, dtype in DTYPES.items()}


def command(name: str, out_dir: str, given: Mapping[str, Any], settings: Mapping[str, Any], *classes: type) -> str:
    """`spectral-fast NAME` with its inputs, and those settings that are not the defaults.

    Args:
        name: of the command.
        out_dir: its folder.
        given: flag -> value, in this order; True for a flag without one, None and False for none.
        settings: as the record has them.
        classes: dataclasses whose fields are the command's other flags.
    """
    words = ["spectral-fast", name]
    for flag, value in given.items():
        words += _words(f"--{flag}", value)
    for f in (f for cls in classes for f in fields(cls)):
        if f.name not in given and f.name in settings and settings[f.name] != _default(f):
            words += _words(flag_name(f), settings[f.name])
    return shlex.join([*words, "--out_dir", out_dir])


def selected(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The flag for the modules of a record; commands differ in its default."""
    return {"target_modules": settings.get("target_modules")}


def measured(probe: Mapping[str, Any]) -> dict[str, Any]:
    """The flags with which the sensitivities of a probe's record are measured again."""
    calibration = {
        f.name: probe[f.name] for f in fields(CalibrationOptions) if probe.get(f.name, _default(f)) != _default(f)
    }
    more = {name: probe.get(name) for name in ("load_in_4bit", "stream")}
    if probe.get("device_map") not in (None, "none"):
        more["device_map"] = probe["device_map"]
    return {**calibration, "dtype": _DTYPES.get(str(probe.get("dtype"))), **more}


def _default(f: Field[Any]) -> Any:
    return list(f.default) if isinstance(f.default, tuple) else f.default


def _words(flag: str, value: Any) -> Iterable[str]:
    if value is None or value is False:
        return [flag] if flag.startswith("--no_") else []
    if value is True:
        return [flag]
    return [flag, *map(in_command, value if isinstance(value, (list, tuple)) else [value])]
