"""The native kernels for CPUs. Without GCC 10 or later the package is complete without them: torch's
operators take their place."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

FOLDER = Path("workers/nn/native")
SOURCES = (
    "module",
    "base",
    "repack",
    "avx2",
    "avx2_half",
    "avx2_quantized",
    "avx512",
    "avx512_bf16",
    "avx2_grouped",
    "avx512_vnni",
    "avx512_grouped",
    "avx512_int4",
    "amx_bf16",
    "amx_int8",
)
kernels = Extension(
    "workers.nn.native._kernels",
    sources=[str(FOLDER / f"{name}.cpp") for name in SOURCES],
    depends=[
        str(FOLDER / name)
        for name in (
            "kernels.inc",
            "vectors.inc",
            "kv_bits.inc",
            "attend_rows.inc",
            "delta.inc",
            "delta_net.inc",
            "half_products.inc",
            "grouped.inc",
            "grouped_lanes.inc",
            "grouped_products.inc",
            "kernels.h",
            "threads.h",
            "avx512_rows.h",
        )
    ],
    # Not linked with OpenMP: its functions are those that torch has loaded, so that both share their threads.
    extra_compile_args=[
        "-O3",
        "-std=c++17",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wno-psabi",
    ],
    extra_link_args=["-Wl,--unresolved-symbols=ignore-all"],
    define_macros=[("Py_LIMITED_API", "0x030b0000")],
    py_limited_api=True,
    optional=True,
)


class BuildKernels(build_ext):
    """AMX needs GCC 11: an older compiler builds the rest."""

    def build_extension(self, extension: Extension) -> None:
        try:
            super().build_extension(extension)
        except CCompilerError:
            extension.sources = [path for path in extension.sources if "amx" not in path]
            extension.define_macros.append(("NO_AMX", "1"))
            self.force = True  # sources that were compiled for the whole
            super().build_extension(extension)


setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
