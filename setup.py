"""Build of the native code; metadata and tool settings are in pyproject.toml.

These libraries are built into the package:
    libqkernels_core.so  the kernels: no torch, no Python (csrc/common, csrc/cpu)
    _C                   torch operators over the core, on the LibTorch stable ABI: one binary for torch >= 2.10
    _native              NumPy entry points to the same core (pybind11), also used to force an ISA
    _C_cuda              torch operators on CUDA tensors (csrc/cuda), where QKERNELS_CUDA=1: needs nvcc, but neither a
                         GPU nor a torch with CUDA. TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" chooses the GPUs
No file is compiled with ISA flags: each kernel file raises its own target by pragma, and the CPU is detected at run
time. Sources are found by glob, so that a new kernel file needs no change here.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

TORCH_TARGET = "0x020a000000000000ULL"  # 2.10, the oldest torch the binary runs on
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-fno-strict-aliasing"]  # scratch holds bytes, then floats; measured: it costs nothing
# GCC 12 reports its own AVX-512 headers as using uninitialized values.
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-cudart=static", "-DUSE_CUDA"]
NVCC_FLAGS += [
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-fno-strict-aliasing",
    "--compress-mode=size",
    "--threads=0",
]
CUDA_TARGETS = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0;10.0;12.0+PTX").replace(" ", ";")
# On PATH, or that of the package cuda-toolkit[nvcc,cudart,cccl], which keeps its libraries where nvcc does not look.
PACKAGED_NVCC = glob(f"{sysconfig.get_path('purelib')}/nvidia/cu*/bin/nvcc")
NVCC = os.environ.get("NVCC") or shutil.which("nvcc") or next(iter(PACKAGED_NVCC), "nvcc")


class BuildNative(BuildExtension):
    """Builds the core first and lets the two modules link against it, wherever they are installed."""

    def get_ext_filename(self, name: str) -> str:
        if name.endswith("libqkernels_core"):
            return name.replace(".", "/") + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "qkernels.libqkernels_core":
            ext.library_dirs.append(str(Path(self.get_ext_fullpath("qkernels.libqkernels_core")).parent))
        if ext.name == "qkernels._C_cuda":
            self.build_cuda(ext)
        else:
            super().build_extension(ext)

    def build_cuda(self, ext: Extension) -> None:
        """Compile and link with nvcc alone; torch's build tools would ask for a torch with CUDA."""
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [NVCC, "-shared", *ext.extra_compile_args, "-o", str(output)]
        command += [f"-I{path}" for path in (*ext.include_dirs, *self.include_dirs)]
        with TemporaryDirectory() as stub:
            if not any(Path(path, "libtorch_cuda.so").exists() for path in ext.library_dirs):
                name = f"{stub}/libtorch_cuda.so"
                flags = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
                subprocess.run(["cc", *flags, "csrc/torch/torch_cuda_stub.c", "-o", name], check=True)
            toolkit = Path(NVCC).resolve().parent.parent / "lib"
            command += [*ext.sources, *sorted(glob("csrc/cuda/*.cu"))]
            command += [f"-L{path}" for path in (*ext.library_dirs, toolkit, stub)]
            command += [f"-l{name}" for name in ext.libraries]
            subprocess.run([*command, "-Xlinker=-rpath,$ORIGIN"], check=True)


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


def cuda_targets() -> list[str]:
    """nvcc's flags for CUDA_TARGETS: machine code for each GPU, and PTX where it ends in +PTX."""
    flags = [f'-DQKERNELS_CUDA_TARGETS="{CUDA_TARGETS}"']
    for arch in CUDA_TARGETS.split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_label() -> str:
    """What the version of a wheel with CUDA kernels ends in, such as "+cu130": the toolkit they were built with."""
    if shutil.which(NVCC) is None:
        raise SystemExit("QKERNELS_CUDA=1 needs nvcc: put it on PATH, or pip install 'cuda-toolkit[nvcc,cudart,cccl]'")
    release = re.search(r"release (\d+)\.(\d+)", subprocess.check_output([NVCC, "--version"], text=True))
    return f"+cu{release[1]}{release[2]}"


core = extension("libqkernels_core", glob("csrc/common/*.cpp") + glob("csrc/cpu/**/*.cpp", recursive=True))
torch_ops = extension(
    "_C",
    ["csrc/torch/ops.cpp"],
    include_dirs=include_paths(),
    library_dirs=library_paths(),
    libraries=["torch_cpu"],
    flags=[f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"],
    py_limited_api=True,
)
native = extension("_native", ["csrc/python/native.cpp"], include_dirs=[pybind11.get_include()])

extensions, options = [core, torch_ops, native], {}
if os.environ.get("QKERNELS_CUDA") == "1":
    options["egg_info"] = {"tag_build": cuda_label()}
    extensions.append(
        Extension(
            "qkernels._C_cuda",
            sorted(glob("csrc/torch/cuda_*.cpp")),  # build_cuda adds the .cu, which torch's build tools must not see
            depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/cuda/*.cu*"),
            include_dirs=["csrc", *include_paths()],
            library_dirs=library_paths(),
            libraries=["qkernels_core", "torch_cpu", "torch_cuda"],
            extra_compile_args=[*NVCC_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *cuda_targets()],
            py_limited_api=True,
        )
    )

setup(
    ext_modules=extensions,
    options=options,
    cmdclass={"build_ext": BuildNative.with_options(no_python_abi_suffix=False)},
)
