"""Builds the optional C libraries; everything else is configured in pyproject.toml.

They are plain shared libraries (no Python API): `quant/native.py` loads one with ctypes, the allocation meter is
preloaded into a process. Without a compiler the install still succeeds and the package falls back to torch.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-std=gnu11", "-Wall", "-Wextra"]
SAME, FUSED = "-ffp-contract=off", "-ffp-contract=fast"  # the same bits on every processor, or a multiplication and a sum in one instruction
LIBRARIES = {  # shared library: (C source, libraries to link, how products and sums are rounded)
    "mebp_compile.quant._dequantise": ("mebp_compile/quant/kernels/dequantise.c", [], SAME),
    "mebp_compile.kernels._attention": ("mebp_compile/kernels/attention.c", ["m"], FUSED),
    "mebp_compile.kernels._cross_entropy": ("mebp_compile/kernels/cross_entropy.c", ["m"], SAME),
    "mebp_compile.kernels._fused": ("mebp_compile/kernels/fused.c", ["m"], FUSED),
    "solvers._anneal": ("solvers/anneal.c", ["m"], SAME),
    "solvers._closure": ("solvers/closure.c", ["m"], SAME),
    "solvers._decode": ("solvers/decode.c", [], SAME),
    "solvers._disk_anneal": ("solvers/disk_anneal.c", ["m"], SAME),
    "solvers._eject": ("solvers/eject.c", ["m"], SAME),
    "solvers._pack": ("solvers/pack.c", [], SAME),
    "solvers._transfers": ("solvers/transfers.c", ["m"], SAME),
    "mebp_compile.measure._cached_read": ("mebp_compile/measure/cached_read.c", [], SAME),
    "mebp_compile.measure._malloc_meter": ("mebp_compile/measure/malloc_meter.c", ["dl", "pthread"], SAME),
}


class BuildPlainLibrary(build_ext):
    """Links without libpython and without an exported `PyInit_` symbol: no library here is a Python module."""

    def get_libraries(self, ext: Extension) -> list[str]:
        return list(ext.libraries)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols)


def extensions() -> list[Extension]:
    """One optional extension for each source that exists."""
    root = Path(__file__).resolve().parent
    return [
        Extension(
            name, [source], libraries=libraries, extra_compile_args=[*FLAGS, rounding],
            depends=[str(path) for package in ("mebp_compile", "solvers") for path in (root / package).glob("**/*.h")], optional=True,
        )
        for name, (source, libraries, rounding) in LIBRARIES.items()
        if (root / source).exists()
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildPlainLibrary})
