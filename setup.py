"""Build of the native code; metadata and tool settings are in pyproject.toml.

Three libraries are built into the package:
    libqkernels_core.so  the kernels: no torch, no Python (csrc/core, csrc/cpu)
    _C                   torch operators over the core, on the LibTorch stable ABI: one binary for torch >= 2.10
    _native              NumPy entry points to the same core (pybind11), also used to force an ISA
No file is compiled with ISA flags: each kernel file raises its own target by pragma, and the CPU is detected at run
time. Sources are found by glob, so that a new kernel file needs no change here.
"""

from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

TORCH_TARGET = "0x020a000000000000ULL"  # 2.10, the oldest torch the binary runs on
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
# GCC 12 reports its own AVX-512 headers as using uninitialized values.
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


class BuildNative(BuildExtension):
    """Builds the core first and lets the two modules link against it, wherever they are installed."""

    def get_ext_filename(self, name: str) -> str:
        if name.endswith("libqkernels_core"):
            return name.replace(".", "/") + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "qkernels.libqkernels_core":
            ext.library_dirs.append(str(Path(self.get_ext_fullpath("qkernels.libqkernels_core")).parent))
        super().build_extension(ext)


def extension(name: str, sources: list[str], **options) -> Extension:
    is_core = name == "libqkernels_core"
    return Extension(
        f"qkernels.{name}",
        sorted(sources),
        language="c++",
        depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True),
        include_dirs=[str(Path(__file__).resolve().parent / "csrc"), *options.pop("include_dirs", [])],
        libraries=[*([] if is_core else ["qkernels_core"]), *options.pop("libraries", [])],
        extra_compile_args=CXX_FLAGS + options.pop("flags", []),
        extra_link_args=["-Wl,-rpath,$ORIGIN"],
        **options,
    )


core = extension("libqkernels_core", glob("csrc/core/*.cpp") + glob("csrc/cpu/*.cpp"))
torch_ops = extension(
    "_C",
    ["csrc/ops.cpp"],
    include_dirs=include_paths(),
    library_dirs=library_paths(),
    libraries=["torch_cpu"],
    flags=[f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"],
    py_limited_api=True,
)
native = extension("_native", ["csrc/native.cpp"], include_dirs=[pybind11.get_include()])

setup(
    ext_modules=[core, torch_ops, native],
    cmdclass={"build_ext": BuildNative.with_options(no_python_abi_suffix=False)},
)
