"""Time and error of an LSTM in float, quantized by qkernels, and by torch.ao's dynamic quantization.

Rounds are interleaved in one process; a time is the median. The error is the relative Frobenius norm of the difference
of the outputs to those of float. Run: python benchmarks/recurrent.py --output rows.json
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

SIZES = ((256, 64, 1), (256, 64, 16), (1024, 32, 1), (1024, 32, 16))  # features, steps, batch


def contenders(features: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    layer = nn.LSTM(features, features, batch_first=True).eval()
    found = {"float": layer}
    for scheme in ("w8a8", "w4a8-g32"):
        found[scheme] = qk.QuantLSTM.from_float(layer, scheme).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and what people have
        model = nn.Sequential(copy.deepcopy(layer))
        found["torch.ao"] = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, torch.qint8)[0]
    return found


def seconds(layer: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    layer(x)
    return time.perf_counter() - start


@torch.no_grad()
def rows(rounds: int) -> list[dict]:
    results = []
    for features, steps, batch in SIZES:
        layers, x = contenders(features), torch.randn(batch, steps, features)
        expected = layers["float"](x)[0]
        errors = {name: ((layer(x)[0] - expected).norm() / expected.norm()).item() for name, layer in layers.items()}
        times: dict[str, list[float]] = {name: [] for name in layers}
        for _ in range(rounds):
            for name, layer in layers.items():
                times[name].append(seconds(layer, x))
        for name in layers:
            size = {"features": features, "steps": steps, "batch": batch}
            median = statistics.median(times[name])
            results.append({**size, "contender": name, "seconds": median, "error": errors[name]})
            print(f"{features} {steps:3} {batch:3} {name:10} {1e3 * median:8.2f} ms  error {errors[name]:.4f}")
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
        options.output.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
