"""Time and error of torch's recurrent and encoder layers in float, quantized by qkernels and torch.ao.

Rounds are interleaved in one process; a time is the median. The error is the relative Frobenius norm of the difference
of the outputs to those of float. Run: python benchmarks/torch_layers.py --output rows.json
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import qkernels as qk

# features, steps, batch
SIZES = {
    "LSTM": ((256, 64, 1), (256, 64, 16), (1024, 32, 1), (1024, 32, 16)),
    "TransformerEncoderLayer": ((256, 128, 8), (1024, 128, 1), (1024, 128, 8)),
}
SCHEMES = ("w8a8", "w4a8-g32")


def layer_of(kind: str, features: int) -> nn.Module:
    if kind == "LSTM":
        return nn.LSTM(features, features, batch_first=True)
    return nn.TransformerEncoderLayer(features, 8, 4 * features, batch_first=True)


def contenders(kind: str, features: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(layer_of(kind, features)).eval()
    found = {"float": copy.deepcopy(model)}
    for scheme in SCHEMES:
        found[scheme] = copy.deepcopy(model)
        qk.quantize_(found[scheme], scheme)
    if kind == "LSTM":  # an encoder layer of torch.ao fails in its fast path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, and what people have
            found["torch.ao"] = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, torch.qint8)
    return found


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return out[0] if isinstance(out, tuple) else out


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    model(x)
    return time.perf_counter() - start


@torch.no_grad()
def rows(rounds: int) -> list[dict]:
    results = []
    for kind, (features, steps, batch) in [(kind, sizes) for kind, several in SIZES.items() for sizes in several]:
        models, x = contenders(kind, features), torch.randn(batch, steps, features)
        expected = output(models["float"], x)
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds):
            for name, model in models.items():
                times[name].append(seconds(model, x))
        for name, model in models.items():
            error = ((output(model, x) - expected).norm() / expected.norm()).item()
            row = {"layer": kind, "features": features, "steps": steps, "batch": batch, "contender": name}
            results.append({**row, "seconds": statistics.median(times[name]), "error": error})
            print(*row.values(), f"{1e3 * results[-1]['seconds']:.2f} ms, error {error:.4f}", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = rows(options.rounds)
    if options.output:
        about = {"torch": torch.__version__, "isa": qk.isa.current(), "threads": options.threads}
        about |= {"note": "taken beside other jobs on the machine: compare within a size"}
        options.output.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
