"""The CUDA kernels compiled for the host, over the emulator: built here, called with CPU tensors."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpu_emulation import host
from gpu_emulation.files import made_once
from qkernels import QuantScheme
from qkernels.formats.storage import QuantizedRows, StoredWeight
from qkernels.kernels import arguments

ROOT = host.HERE.parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
HERE = Path(__file__).parent
HOST_SOURCES = [host.HERE / "emulator.cpp", HERE / "entry.cpp", ROOT / "csrc/common/scheme.cpp"]
FLAGS = ["-DQK_EMULATED", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
MISSING = host.MISSING

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # qk::DType

_TEMPORARY = tempfile.TemporaryDirectory()
FOLDER = Path(_TEMPORARY.name)  # what is compiled goes here; processes may share another one


@cache
def _object(source: Path) -> Path:
    """The compiled file; the same in every library that does not replace it."""
    return made_once(FOLDER / f"{source.name}.o", lambda path: compile_source(source, path))


def compile_source(source: Path, to: Path, *flags: str, before: Path | None = None) -> Path:
    """Compile a kernel; headers are looked for in `before` first."""
    first = [] if before is None else [f"-I{before}"]
    return host.compile_source(source, to, [*first, *FLAGS, *flags])


@cache
def library() -> Emulated:
    return link("emulated")


def link(name: str, **replaced: Path) -> Emulated:
    """The library of this name, with other objects for the sources named by their stem."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda s: replaced.get(s.stem) or _object(s), [*SOURCES, *HOST_SOURCES]))
    return Emulated(made_once(FOLDER / f"{name}.so", lambda path: host.link(objects, path)))


class Emulated(host.Host):
    """The operators of `csrc/cuda/api.h`, with the signatures of `qkernels.kernels.reference`; see `call`.

    Attributes:
        processors: of the device; few of them, so that small matrices reach large tiles.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.library.emulator_scratch.restype = ctypes.c_void_p
        self._kept: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self.processors = 2

    def reason(self, choice: str, rows: int, columns: int, depth: int, processors: int) -> str:
        """Why `tile` or `slices` are chosen as they are for a product."""
        function = getattr(self.library, f"{choice}_reason")
        function.restype = ctypes.c_char_p
        return function(rows, columns, depth, processors).decode()

    def kernels(self) -> set[str]:
        """Mangled names of all kernels."""
        listed = subprocess.run(["nm", "-D", self.library._name], capture_output=True, text=True, check=True)
        return {
            line.split()[-1]
            for line in listed.stdout.splitlines()
            if line.split()[-1].startswith("_Z") and "_kernel" in line
        }

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy that ends where memory ends."""
        size = max(1, tensor.numel()) * tensor.element_size()
        memory = torch.from_numpy(self.place(np.zeros(size, np.uint8)))
        kept = memory.view(tensor.dtype)[: tensor.numel()].view(tensor.shape)
        kept.copy_(tensor)
        self._kept.append(kept)
        return kept

    def noise(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a result, filled with what no result should hold."""
        out = self.keep(torch.empty(shape, dtype=dtype))
        out.fill_(torch.nan if dtype.is_floating_point else 0x5A)
        self._outputs.append(out)
        return out

    def results(self) -> tuple[Tensor, ...]:
        """What the last call's results hold now."""
        return tuple(out.clone() for out in self._outputs)

    def _call(self, name: str, *args) -> Tensor | tuple[Tensor, ...]:
        converted = []
        for value in args:
            if isinstance(value, Tensor):
                converted.append(ctypes.c_void_p(value.data_ptr()))
            elif value is None:
                converted.append(ctypes.c_void_p())
            elif isinstance(value, str):
                converted.append(ctypes.c_char_p(value.encode()))
            else:
                converted.append(ctypes.c_int64(value))
        self.check(getattr(self.library, name)(*converted))
        results = self.results()
        return results if len(results) > 1 else results[0]

    def call(self, name: str, *args, **keywords) -> Tensor | tuple[Tensor, ...]:
        """The operator `name`, with the arguments of its schema."""
        return getattr(self, name)(*arguments.bundle(name, args), **keywords)

    def record(self, name: str, *args, **keywords) -> list[host.Recorded]:
        """The launches of an operator, which are not run; its results stay noise."""
        self.library.emulator_record(1)
        try:
            self.call(name, *args, **keywords)
        finally:
            self.library.emulator_record(0)
        return self.recorded()

    def buffers(self) -> list[tuple[np.ndarray, bool]]:
        """The bytes of all that the launches of the last call may touch, and whether they hold a value before."""
        written = {out.data_ptr() for out in self._outputs}
        found = [(t.data_ptr(), t.numel() * t.element_size(), t.data_ptr() not in written) for t in self._kept]
        for i in range(self.library.emulator_scratch_count()):
            size = ctypes.c_size_t()
            found.append((self.library.emulator_scratch(i, ctypes.byref(size)), size.value, False))
        return [(host.bytes_at(address, size), defined) for address, size, defined in found if size]

    def _stored(self, weight: StoredWeight) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else self.keep(tensor) for tensor in weight[:3])

    def _release(self) -> None:
        for tensor in self._kept:
            size = max(1, tensor.numel()) * tensor.element_size()
            self.library.emulator_free(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(size))
        self._kept, self._outputs = [], []

    def _begin(self, x: Tensor) -> Tensor:
        self._release()
        return self.keep(x)

    def quantize_activation(self, x: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        x = self._begin(x)
        group = scheme.act_group_size or x.shape[1]
        q = self.noise(x.shape, torch.int8)
        scales = self.noise((x.shape[0], -(-x.shape[1] // group)), torch.float32)
        return self._call("quantize_activation", x, DTYPES[x.dtype], *x.shape, scheme.name, q, scales)

    def quantize_rows_stochastic(
        self, x: Tensor, factors: Tensor | None, seed: Tensor, rng_stream: int
    ) -> tuple[Tensor, Tensor]:
        x = self._begin(x)
        factors = None if factors is None else self.keep(factors)
        q, scales = self.noise(x.shape, torch.int8), self.noise((x.shape[0],), torch.float32)
        return self._call(
            "quantize_rows_stochastic", x, DTYPES[x.dtype], *x.shape, factors, seed.item(), rng_stream, q, scales
        )

    def linear(
        self, x: Tensor, weight: StoredWeight, bias: Tensor | None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        return self._call("linear", *self._product(x, weight, bias, out_dtype), self.processors)

    def linear_with_saved_input(
        self, x: Tensor, weight: StoredWeight, bias: Tensor | None, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        product = self._product(x, weight, bias, out_dtype)
        saved = self.noise(x.shape, torch.int8), self.noise((x.shape[0],), torch.float32)
        return self._call("linear_with_saved_input", *product, *saved, self.processors)

    def _product(self, x: Tensor, weight: StoredWeight, bias: Tensor | None, out_dtype: torch.dtype | None) -> tuple:
        """The arguments of a product, and where its result goes."""
        x, n, scheme = self._begin(x), weight.out_features, weight.scheme.name
        out = self.noise((x.shape[0], n), out_dtype or x.dtype)
        stored = self._stored(weight)
        bias = None if bias is None else self.keep(bias)
        bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
        return x, DTYPES[x.dtype], *x.shape, *stored, n, scheme, bias, bias_dtype, out, DTYPES[out.dtype]

    def int_grad_input(
        self,
        grad: QuantizedRows,
        weight: StoredWeight,
        column_scales: Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        q_grad, n, in_features = self._begin(grad.integers), weight.out_features, weight.in_features
        grad_scales, stored = self.keep(grad.scales), self._stored(weight)
        columns = None if column_scales is None else self.keep(column_scales)
        out = self.noise((q_grad.shape[0], in_features), out_dtype or torch.float32)
        given = (q_grad, grad_scales, q_grad.shape[0], *stored, n, in_features, weight.scheme.name, columns)
        return self._call("int_grad_input", *given, out, DTYPES[out.dtype], self.processors)
