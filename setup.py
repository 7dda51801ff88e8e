"""Builds spectral_fast._C with CMake and ninja; everything declarative is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Hands the extension to CMakeLists.txt and tells it where the module must lie."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds in the temporary directory that setuptools names."""
        # Build-time requirements: imported here so that `python setup.py --version` needs neither.
        import ninja
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # `python -m cmake` and ninja's full path: pip's isolated environment need not be on PATH.
        cmake = [sys.executable, "-m", "cmake"]
        configure = [
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        # A cache left by another isolated environment points at tools that no longer exist.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run([*cmake, *configure], check=True)
        subprocess.run([*cmake, "--build", str(build)], check=True)

    def copy_file(self, infile: str, outfile: str, *args: Any, **options: Any) -> tuple[str, bool]:  # type: ignore[override]
        """Into the checkout: at once, so that a process that starts meanwhile meets the old module or the new one."""
        partial = f"{outfile}.{os.getpid()}.partial"
        super().copy_file(infile, partial, *args, **options)
        Path(partial).replace(outfile)
        return outfile, True


class TreeAsItIs(sdist):
    """Puts the link spectral_fast/kernels where setuptools left a second copy of what it points at."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Lays out the folder that is packed."""
        super().make_release_tree(base_dir, files)
        link = Path(base_dir) / "spectral_fast" / "kernels"
        shutil.rmtree(link)
        link.symlink_to((ROOT / "spectral_fast" / "kernels").readlink())


def files(*patterns: str) -> list[str]:
    """Paths under the root, relative and sorted: what the sdist must carry."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


setup(
    ext_modules=[
        Extension("spectral_fast._C", sources=files("csrc/*.cpp"), depends=["CMakeLists.txt", *files("csrc/*.h")])
    ],
    cmdclass={"build_ext": CMakeBuild, "sdist": TreeAsItIs},
)
