"""The native kernels for CPUs. Without GCC 10 or later the package is complete without them: torch's
operators take their place."""

from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("workers/nn/native")
kernels = Extension(
    "workers.nn.native._kernels",
    sources=[
        str(FOLDER / f"{name}.cpp")
        for name in ("module", "base", "avx2", "avx512", "avx512_bf16", "avx512_vnni")
    ],
    depends=[str(FOLDER / name) for name in ("kernels.inc", "delta.inc", "kernels.h", "threads.h")],
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
setup(ext_modules=[kernels])
