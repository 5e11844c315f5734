"""Static beside dynamic activations: the time of a product, and what observers cost MiniLM, beside torch.ao.

Times are medians of interleaved rounds in one process. The error is the relative Frobenius norm of the difference of
MiniLM's mean-pooled embeddings of held-out sentences to those of the float model; the calibration sees other sentences.
torch.ao quantizes each linear layer statically, in eager mode (`QuantWrapper`), with the configuration that it names.

    python benchmarks/static_activations.py --output static.json
"""

import argparse
import copy
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from pretraining import minilm_folder
from torch import nn
from transformers import AutoModel, AutoTokenizer

import qkernels as qk
from qkernels.bench.results import machine
from qkernels.kernels import ops
from qkernels.ptq.observers import OBSERVERS, PercentileObserver

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((768, 3072), (2048, 2048))  # K, N
ROWS = (1, 16, 256)
X_SCALE = torch.tensor([0.03])
CALIBRATION, HELD_OUT, BATCH = 64, 96, 16


def product_times(rounds: int) -> list[dict]:
    rows = []
    for k, n in SHAPES:
        weight = ops.quantize_weight(torch.randn(n, k), "w8a8")
        for m in ROWS:
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(m, k).to(dtype)
                calls = {
                    "w8a8": lambda x=x, weight=weight: ops.linear(x, *weight, None, "w8a8"),
                    "w8a8s": lambda x=x, weight=weight: ops.linear(x, *weight, None, "w8a8s", None, X_SCALE),
                }
                medians = interleaved(calls, rounds)
                facts = {"rows": m, "in_features": k, "out_features": n, "dtype": str(dtype).removeprefix("torch.")}
                rows += [{**facts, "scheme": name, "seconds": seconds} for name, seconds in medians.items()]
    return rows


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def sentences() -> list[str]:
    """English sentences of the documentation, in a fixed order that mixes the pages."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    text = "\n".join(re.sub(r"(?s)```.*?```", "", page.read_text()) for page in pages)
    found = [part.strip() for part in re.split(r"(?<=[.:])\s+", text) if 40 <= len(part) <= 300 and "|" not in part]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


def embeddings(model: nn.Module, batches: list) -> torch.Tensor:
    with torch.no_grad():
        parts = []
        for batch in batches:
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            parts.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.cat(parts)


def torch_ao(model: nn.Module, batches: list, backend: str) -> nn.Module:
    ao = torch.ao.quantization
    torch.backends.quantized.engine = backend
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "pooler" not in name:
            wrapped = ao.QuantWrapper(layer)
            wrapped.qconfig = ao.get_default_qconfig(backend)
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, wrapped)
    ao.prepare(model, inplace=True)
    embeddings(model, batches)
    return ao.convert(model, inplace=True)


def observer_errors(rounds: int) -> list[dict]:
    tokenizer, texts = AutoTokenizer.from_pretrained(minilm_folder()), sentences()
    assert len(texts) >= CALIBRATION + HELD_OUT, len(texts)

    def batched(texts: list[str]) -> list:
        starts = range(0, len(texts), BATCH)
        return [tokenizer(texts[i : i + BATCH], return_tensors="pt", padding=True, truncation=True) for i in starts]

    seen = [dict(batch) for batch in batched(texts[:CALIBRATION])]
    held_out = batched(texts[CALIBRATION : CALIBRATION + HELD_OUT])
    floats = AutoModel.from_pretrained(minilm_folder()).eval()
    models = {"float": floats}
    for scheme in ("w8a8", "w8a16"):
        models[scheme] = copy.deepcopy(floats)
        qk.quantize_(models[scheme], scheme, skip=["pooler"])
    observers = {**OBSERVERS, "percentile 99.9": lambda: PercentileObserver(99.9)}
    for name, observer in observers.items():
        models[f"w8a8s {name}"] = copy.deepcopy(floats)
        qk.quantize_(models[f"w8a8s {name}"], "w8a8s", skip=["pooler"], calibration=seen, observer=observer)
    for backend in ("x86", "onednn"):
        if backend in torch.backends.quantized.supported_engines:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated, and what people have
                models[f"torch.ao {backend}"] = torch_ao(copy.deepcopy(floats), seen, backend)
    expected = embeddings(floats, held_out)
    errors = {
        name: ((embeddings(model, held_out) - expected).norm() / expected.norm()).item()
        for name, model in models.items()
    }
    calls = {name: lambda model=model: embeddings(model, held_out[:1]) for name, model in models.items()}
    times = interleaved(calls, rounds)
    return [{"contender": name, "error": errors[name], "seconds": times[name]} for name in models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    result = {
        "machine": machine(),
        "threads": args.threads,
        "note": "taken beside other jobs: compare rows of one shape, and no more",
        "products": product_times(args.rounds),
        "minilm": observer_errors(max(args.rounds // 20, 3)),
    }
    for row in (*result["products"], *result["minilm"]):
        print(*row.values())
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
