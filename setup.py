"""Builds the extension `ffvt._C` from csrc/. Everything else about the package is in pyproject.toml.

FFVT_NO_EXT=1 skips the extension. Without a working compiler the package installs without it, which
`ffvt.info()` tells.
"""

import os
import sys
from pathlib import Path

from setuptools import setup


def extension_arguments() -> dict:
    if os.environ.get("FFVT_NO_EXT") == "1":
        print("ffvt: FFVT_NO_EXT=1, the extension ffvt._C is not built", file=sys.stderr)
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"ffvt: the extension ffvt._C is not built: {error}", file=sys.stderr)
        return {}

    class OptionalBuildExtension(BuildExtension):
        """A failed build leaves a working package without the extension."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # a missing compiler shows in many ways: no such program, a failed ninja, ...
                print(f"ffvt: the extension ffvt._C is not built: {error}", file=sys.stderr)
                self.extensions = []

    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    extension = CppExtension("ffvt._C", sources, extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden"])
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuildExtension.with_options(use_ninja=True)}}


setup(**extension_arguments())
