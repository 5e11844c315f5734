"""llama.cpp's ggml, through the libraries that the package llama-cpp-python builds."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import weakref
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .candidate import Candidate, Case

F32 = 0  # ggml_type
TENSORS = 8  # room in a context: more than a graph here has


LOG_ERROR = 4  # ggml_log_level
LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


# Name, result, arguments.
FUNCTIONS: tuple[tuple[str, Any, list[Any]], ...] = (
    ("ggml_log_set", None, [LogCallback, c_void_p]),
    ("ggml_init", c_void_p, [InitParams]),
    ("ggml_free", None, [c_void_p]),
    ("ggml_tensor_overhead", c_size_t, []),
    ("ggml_graph_overhead", c_size_t, []),
    ("ggml_new_tensor_2d", c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    ("ggml_row_size", c_size_t, [c_int, c_int64]),
    ("ggml_mul_mat", c_void_p, [c_void_p, c_void_p, c_void_p]),
    ("ggml_add", c_void_p, [c_void_p, c_void_p, c_void_p]),
    ("ggml_new_graph", c_void_p, [c_void_p]),
    ("ggml_build_forward_expand", None, [c_void_p, c_void_p]),
    ("ggml_get_data", c_void_p, [c_void_p]),
    ("ggml_quantize_chunk", c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    ("ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, [c_void_p, c_void_p]),
    ("ggml_backend_buffer_free", None, [c_void_p]),
    ("ggml_backend_buft_name", c_char_p, [c_void_p]),
    ("ggml_backend_tensor_set", None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    ("ggml_backend_graph_compute", c_int, [c_void_p, c_void_p]),
    ("ggml_backend_get_default_buffer_type", c_void_p, [c_void_p]),
    ("ggml_backend_get_device", c_void_p, [c_void_p]),
    ("ggml_backend_dev_backend_reg", c_void_p, [c_void_p]),
    ("ggml_backend_reg_get_proc_address", c_void_p, [c_void_p, c_char_p]),
    ("ggml_backend_free", None, [c_void_p]),
    ("ggml_backend_cpu_init", c_void_p, []),
    ("ggml_backend_cpu_set_n_threads", None, [c_void_p, c_int]),
)


class _Library:
    """The functions as attributes, without their prefix `ggml_`."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, folder: Path):
        # Everything through this one: the base library lies there under several names, and each would be a copy.
        library = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        for name, result, arguments in FUNCTIONS:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        # By default it prints a line for each weight.
        self._log = LogCallback(lambda level, text, _: level == LOG_ERROR and print(text.decode(), file=sys.stderr))
        self.log_set(self._log, None)

    def repack_buffer_type(self, backend: int) -> int | None:
        """The buffer type that rearranges weights for the CPU's kernels, if this build has it."""
        device = self.backend_get_device(backend)
        address = self.backend_reg_get_proc_address(
            self.backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
        )
        if not address:
            return None
        found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        i = 0
        while found and found[i]:
            if self.backend_buft_name(found[i]) == b"CPU_REPACK":
                return found[i]
            i += 1
        return None


@cache
def _library() -> _Library:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None  # `unavailable` has asked
    return _Library(Path(spec.origin).parent / "lib")


class Ggml(Candidate):
    """x times a weight in one of ggml's formats, plus bias, as a graph of its CPU backend."""

    kind = "int8"
    module = "llama_cpp"
    dtype = torch.float32
    type: int
    block: int
    repack: bool

    def unavailable(self) -> str | None:
        if self.case.k % self.block:
            return f"in_features is not a multiple of {self.block}"
        if self.repack and self.case.n % 8:
            return "out_features is not a multiple of 8"
        return super().unavailable()

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        ggml, case = _library(), self.case
        backend = ggml.backend_cpu_init()
        ggml.backend_cpu_set_n_threads(backend, case.threads)
        plain = ggml.backend_get_default_buffer_type(backend)
        packed = ggml.repack_buffer_type(backend) if self.repack else plain
        if packed is None:
            ggml.backend_free(backend)
            raise RuntimeError("this ggml has no repacked formats")

        size = ggml.tensor_overhead() * TENSORS + ggml.graph_overhead()
        weights, work = (ggml.init(InitParams(size, None, True)) for _ in range(2))
        stored = ggml.new_tensor_2d(weights, self.type, case.k, case.n)
        x = ggml.new_tensor_2d(work, F32, case.k, case.m)
        added = ggml.new_tensor_2d(work, F32, case.n, 1)
        out = ggml.add(work, ggml.mul_mat(work, stored, x), added)
        graph = ggml.new_graph(work)
        ggml.build_forward_expand(graph, out)
        buffers = [
            ggml.backend_alloc_ctx_tensors_from_buft(weights, packed),
            ggml.backend_alloc_ctx_tensors_from_buft(work, plain),
        ]

        quantized = (ctypes.c_char * (ggml.row_size(self.type, case.k) * case.n))()
        ggml.quantize_chunk(self.type, weight.data_ptr(), quantized, 0, case.n, case.k, None)
        ggml.backend_tensor_set(stored, quantized, 0, len(quantized))
        ggml.backend_tensor_set(added, bias.data_ptr(), 0, bias.nbytes)
        result = (c_float * (case.m * case.n)).from_address(ggml.get_data(out))
        view = torch.frombuffer(result, dtype=torch.float32).view(case.m, case.n)
        current: list[Any] = [None]  # what x holds now: it is copied in when it changes, not at each call

        def call(rows: Tensor) -> Tensor:
            if current[0] is not rows:
                ggml.backend_tensor_set(x, rows.data_ptr(), 0, rows.nbytes)
                current[0] = rows
            if status := ggml.backend_graph_compute(backend, graph):
                raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
            return view

        weakref.finalize(call, _free, ggml, buffers, (weights, work), backend)
        return call


def _free(ggml: _Library, buffers: list[int], contexts: tuple[int, ...], backend: int) -> None:
    for buffer in buffers:
        ggml.backend_buffer_free(buffer)
    for context in contexts:
        ggml.free(context)
    ggml.backend_free(backend)


class Q40(Ggml):
    name, weight_bits, tolerance, type, block, repack = "ggml Q4_0 repacked", 4.5, 0.2, 2, 32, True


class Q4K(Ggml):
    name, weight_bits, tolerance, type, block, repack = "ggml Q4_K repacked", 4.5, 0.2, 12, 256, True


class Q80(Ggml):
    name, weight_bits, tolerance, type, block, repack = "ggml Q8_0", 8.5, 0.03, 8, 32, False


def formats(case: Case) -> list[Candidate]:
    return [Q40(case), Q4K(case), Q80(case)]
