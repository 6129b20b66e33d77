"""The native kernels for CPUs. Without GCC 10 or later the package is complete without them: torch's
operators take their place."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

FOLDER = Path("workers/nn/native")
NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
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
    "amx_grouped",
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
            "grouped_weight.inc",
            "grouped_lanes.inc",
            "grouped_products.inc",
            "kernels.h",
            "threads.h",
            "avx512_rows.h",
            "amx_tiles.h",
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
    """Compiles as many files at once as there are cores. What is built has a digest of its sources: where
    that is the same nothing is compiled."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        built, digest = FOLDER / target.name, self._digest(extension)
        if not self.force and built.exists() and digest.encode() in built.read_bytes():
            if not (target.exists() and target.samefile(built)):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(built, target)
            return
        compile_files = self.compiler.compile

        def compile_side_by_side(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(NUM_CORES) as pool:
                objects = pool.map(lambda source: compile_files([source], **options), sources)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_side_by_side
        macros = extension.define_macros
        try:
            extension.define_macros = [*macros, ("DIGEST", f'"{digest}"')]
            super().build_extension(extension)
        except CCompilerError:  # AMX needs GCC 11: an older compiler builds the rest
            extension.sources = [path for path in extension.sources if "amx" not in path]
            extension.define_macros = [*macros, ("NO_AMX", "1")]
            self.force = True  # sources that were compiled for the whole
            super().build_extension(extension)

    def _digest(self, extension: Extension) -> str:
        command = list(getattr(self.compiler, "compiler_so", ()))
        version = (
            subprocess.run([*command[:1], "--version"], capture_output=True, check=False).stdout
            if command
            else b""
        )
        found = hashlib.sha256(repr([platform.machine(), sys.version, command]).encode() + version)
        for name in [*extension.sources, *extension.depends, __file__]:
            found.update(Path(name).read_bytes())
        return found.hexdigest()


setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
