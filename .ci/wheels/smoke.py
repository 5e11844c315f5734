"""What an installed wheel must do without a compiler, a source tree or anything optional.

Exits with status 1 at the first thing that fails. `--bare` demands an environment in which nothing can compile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import torch

import qkernels as qk
from qkernels.kernels import arguments, cuda_library, isa, ops, reference

SCHEMES = ("w8a8", "w8a8-g64-ag32", "w4a8-g32-asym", "w4a16-g32", "w8a16")


def check_environment(bare: bool) -> None:
    """The package under test is the installed one, and nothing here can compile."""
    package = Path(qk.__file__).resolve().parent
    assert package.is_relative_to(Path(sysconfig.get_path("platlib")).resolve()), f"{package} is not installed"
    compilers = [name for name in ("cc", "gcc", "g++", "clang", "nvcc") if shutil.which(name)]
    assert not (bare and compilers), f"there are compilers: {compilers}"


def check_info() -> dict:
    """`qkernels info` runs, and names for what did not load the reason and what mends it."""
    script = Path(sys.executable).with_name("qkernels")
    done = subprocess.run([script, "info", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["isa"] == isa.current()
    kernels = facts["gpu"]["cuda"]
    assert kernels["loaded"] == bool("+cu" in version("qkernels") and torch.version.cuda), kernels
    assert kernels["reason"] and (kernels["loaded"] or kernels["next_step"]), kernels
    return facts


def check_products() -> None:
    """Integer schemes give the bits of the reference on every instruction set of this CPU; all layers conform."""
    torch.manual_seed(0)
    for scheme in SCHEMES:
        layer = qk.QuantLinear.from_float(torch.nn.Linear(300, 77), scheme)
        for name in isa.supported():
            with isa.force(name):
                for rows in (1, 20, 130):
                    args = (torch.randn(rows, 300), layer.qweight, layer.scales, layer.zeros, layer.bias, scheme)
                    actual, expected = ops.linear(*args), reference.linear(*arguments.bundle("linear", args))
                    if "a8" in scheme:
                        assert torch.equal(actual, expected), f"{scheme} on {name}: not the bits of the reference"
                    else:
                        torch.testing.assert_close(actual, expected)
        report = qk.testing.conformance(layer)
        assert report.passed, report


def check_training() -> None:
    """A quantized model learns, through torch.compile's graphs, too, which need the fake kernels."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    qk.quantize_(model, "w8a8", mode="qat", grad_dtype="int8")
    x, y = torch.randn(32, 64), torch.randn(32, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    losses = []
    for _ in range(20):
        loss = (compiled(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    expected = model(x)
    assert torch.equal(qk.freeze_(model)(x), expected)


def check_missing_device() -> None:
    """Beside a CUDA torch and no GPU, a call says that there is no device, and the CPU goes on working."""
    layer = qk.QuantLinear.from_float(torch.nn.Linear(300, 77), "w8a8")
    try:
        layer.cuda()
    except (RuntimeError, AssertionError) as error:
        assert "NVIDIA" in str(error) or "CUDA" in str(error), error
    else:
        raise AssertionError("a layer was moved to a GPU that is not there")
    if cuda_library.library().loaded:
        try:
            torch.ops.qkernels_cuda.quantize_activation(torch.randn(3, 40), qk.QuantScheme.parse("w8a8").code)
        except (RuntimeError, NotImplementedError) as error:
            assert "CPU" in str(error), error
        else:
            raise AssertionError("a CUDA operator took a tensor on the CPU")
    layer(torch.randn(2, 300))


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bare", action="store_true", help="fail if there is a compiler")
    check_environment(parser.parse_args().bare)
    facts = check_info()
    check_products()
    check_training()
    if not torch.cuda.is_available():
        check_missing_device()
    kernels = facts["gpu"]["cuda"]
    print(f"torch {torch.__version__}, CPU kernels {facts['isa']}, CUDA kernels: {kernels['reason']}: ok")


if __name__ == "__main__":
    main()
