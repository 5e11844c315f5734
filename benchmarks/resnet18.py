"""ResNet-18 whole, 224 x 224: error, bytes and time beside torch and torch.ao's static int8.

    python benchmarks/resnet18.py --write

The network is trained for some steps on synthetic gratings of ten classes, for pretrained weights would have to be
fetched. All run with channels last; where the name says so, batch norms are folded into the convolutions. Times are
medians of rounds in which every candidate runs once, so that all see the same load. `--write` replaces the results
file, of which `python tools/tables.py` makes the table of docs/guide/convolutions.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

import qkernels as qk
from qkernels.diagnostics.environment import environment
from qkernels.system import json_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "resnet18-amd-epyc-avx512bf16-1t.json"
CLASSES = 10
CALIBRATION, TEST = 32, 64


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.downsample = nn.Identity()
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.downsample(x))


def resnet18() -> nn.Sequential:
    """The layers of torchvision's resnet18, with ten classes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    for channels, out in ((64, 64), (64, 128), (128, 256), (256, 512)):
        layers += [Block(channels, out, 1 if channels == out else 2), Block(out, out, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


def gratings(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [count, 3, size, size] of striped patterns under noise, and their classes: five angles, two periods."""
    label = torch.randint(CLASSES, (count,), generator=generator)
    angle, period = (label % 5) * (torch.pi / 5), 6.0 + 6.0 * (label // 5)
    place = torch.arange(size, dtype=torch.float32)
    across = angle.cos()[:, None, None] * place + angle.sin()[:, None, None] * place[:, None]
    phase = 6.28 * torch.rand(count, 1, 1, generator=generator)
    waves = torch.sin(across * (6.28 / period[:, None, None]) + phase)
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    noise = torch.randn(count, 3, size, size, generator=generator)
    return (waves[:, None] * colour + 0.7 * noise).to(memory_format=torch.channels_last), label


def trained(steps: int, generator: torch.Generator) -> nn.Module:
    """The network after so many steps on small images; its batch norms then see large ones."""
    model = resnet18().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        images, label = gratings(16, 64, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), label).backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(8):
            model(gratings(8, 224, generator)[0])
    return model.eval()


def torch_ao(model: nn.Module, images: Tensor) -> nn.Module:
    """torch.ao's post-training static quantization (FX), with its default settings for x86."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (images[:1],))
        with torch.no_grad():
            for batch in images.split(8):
                prepared(batch)
        return convert_fx(prepared)


def quantized(
    model: nn.Module, scheme: str, dtype: torch.dtype = torch.float32, calibration: Tensor | None = None
) -> nn.Module:
    """A copy whose convolutions and head are quantized."""
    model = copy.deepcopy(model).to(dtype)
    batches = None if calibration is None else calibration.to(dtype).split(8)
    qk.quantize_(model, scheme, strict=True, calibration=batches)
    return model


def candidates(model: nn.Module, images: Tensor) -> Iterator[tuple[str, torch.dtype, nn.Module]]:
    """By name: the dtype of the input, and the network."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    folded = fuse(model)
    yield "torch float32", float32, model
    yield "torch float32, folded", float32, folded
    yield "torch bfloat16, folded", bfloat16, copy.deepcopy(folded).to(bfloat16)
    yield "torch.ao static int8 (x86)", float32, torch_ao(model, images)
    yield "w8a8", float32, quantized(model, "w8a8")
    yield "w8a8, folded", float32, quantized(folded, "w8a8")
    yield "w8a8 bfloat16, folded", bfloat16, quantized(folded, "w8a8", bfloat16)
    yield "w8a8s, folded", float32, quantized(folded, "w8a8s", calibration=images)
    yield "w8a8s bfloat16, folded", bfloat16, quantized(folded, "w8a8s", bfloat16, images)
    yield "w4a8-g32, folded", float32, quantized(folded, "w4a8-g32")


def times(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each call."""
    for call in calls:
        call(), call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in seconds]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the saved state dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes


@torch.no_grad()
def measure(rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row for each candidate."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    with torch.enable_grad():
        model = trained(steps, generator)
    calibration, (images, label) = gratings(CALIBRATION, 224, generator)[0], gratings(TEST, 224, generator)
    expected = model(images)
    found = list(candidates(model, calibration))
    rows = []
    for name, dtype, network in found:
        logits = torch.cat([network(batch.to(dtype)).float() for batch in images.split(8)])
        error = (logits - expected).norm() / expected.norm()
        right = (logits.argmax(dim=1) == label).float().mean()
        rows.append({"name": name, "error": error.item(), "accuracy": right.item(), "bytes": stored_bytes(network)})
    for batch in (1, 8):
        calls = [functools.partial(network, images[:batch].to(dtype)) for _, dtype, network in found]
        for row, median in zip(rows, times(calls, rounds), strict=True):
            row[f"median_{batch}"] = median
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="replace the results file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments.rounds, arguments.steps)
    for row in rows:
        print(json.dumps(row))
    if arguments.write:
        json_file.write(RESULTS, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
