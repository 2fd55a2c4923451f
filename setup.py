"""Builds the extensions from csrc/. Everything else about the package is in pyproject.toml.

`ffvt._C` says what this build is and what the CPU can do. `ffvt._cpu_<capability>` are the kernels, compiled once for
every set of instructions of x86; the best one that a CPU has is loaded at run time, so a build runs on any x86 CPU.
Elsewhere, and on x86 without AVX2, PyTorch's own operators take their place.

FFVT_NO_EXT=1 skips them all. Without a working compiler the package installs without them, which `ffvt.info()` says.
FFVT_SANITIZE=1 builds for `make test-asan`: AddressSanitizer, UndefinedBehaviorSanitizer, scratch filled with NaN.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

KERNELS = (
    "maws_attention",
    "maws_attention_backward",
    "maws_select",
    "attention_vecmat",
    "gather_tokens",
    "augment",
    "dropout",
    "products",
    "register",
)
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
CAPABILITIES = {  # name: (what at::vec calls it, the compiler's flags)
    "avx512_bf16": ("AVX512", [*AVX512, "-mavx512bf16"]),
    "avx512": ("AVX512", AVX512),
    "avx2": ("AVX2", ["-mavx2", "-mfma", "-mf16c"]),
}
SANITIZE = [
    "-O1",
    "-g",
    "-UNDEBUG",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]


def extension_arguments() -> dict:
    if os.environ.get("FFVT_NO_EXT") == "1":
        print("ffvt: FFVT_NO_EXT=1, the extensions are not built", file=sys.stderr)
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"ffvt: the extensions are not built: {error}", file=sys.stderr)
        return {}

    class OptionalBuildExtension(BuildExtension):
        """What fails to build is left out, and the package works without it."""

        def build_extensions(self) -> None:
            self.built = []
            super().build_extensions()
            self.extensions = self.built

        def build_extension(self, ext) -> None:
            build_temp = self.build_temp
            self.build_temp = str(Path(build_temp, ext.name))  # one source is compiled for several extensions
            try:
                super().build_extension(ext)
                self.built.append(ext)
            except Exception as error:  # a missing compiler shows in many ways: no such program, a failed ninja, ...
                print(f"ffvt: the extension {ext.name} is not built: {error}", file=sys.stderr)
            finally:
                self.build_temp = build_temp

    def extension(name: str, sources: list[str], flags: list[str]) -> CppExtension:
        sanitize = SANITIZE if os.environ.get("FFVT_SANITIZE") == "1" else []
        return CppExtension(
            f"ffvt.{name}",
            sources,
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden", "-fopenmp", *flags, *sanitize],
            extra_link_args=["-fopenmp", *sanitize],
        )

    kernels = [f"csrc/{kernel}.cpp" for kernel in KERNELS]
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    extensions = [extension("_C", ["csrc/info.cpp"], [])]
    for name, (vec, flags) in CAPABILITIES.items() if on_x86 else ():
        extensions.append(
            extension(f"_cpu_{name}", kernels, [f"-DCPU_CAPABILITY={vec}", f"-DCPU_CAPABILITY_{vec}", *flags])
        )
    return {"ext_modules": extensions, "cmdclass": {"build_ext": OptionalBuildExtension.with_options(use_ninja=True)}}


setup(**extension_arguments())
