"""What the 4-bit tables of bitsandbytes (NF4, FP4) lose as 8-bit integers, on Gemma-3-270M.

The linear layers are rounded to a table with blocks of 64, as bitsandbytes rounds them; then each form that the file
could be read into is compared with these exact values: 8-bit integers by the step that `qkernels.load` takes and by
1 / 127, and 4 bits with zero points. The last row of a table is what the table itself did to the float model.

    python benchmarks/nf4.py --output nf4.json
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.bench.results import machine
from qkernels.checkpoints.bitsandbytes import table_as_integers
from qkernels.finetune import load_model, load_tokenizer, resolve_model, token_blocks
from qkernels.finetune.models import default_cache

BLOCK, TOKENS, BLOCKS = 64, 256, 4
FOUR_BITS = "w4a16-g32-asym"
# Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", appendix E; and the values of FP4 by code.
_NF4 = (
    "-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1"
)
TABLES = {
    "NF4": torch.tensor([float(value) for value in _NF4.split()]),
    "FP4": torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12,
}


def rounded(weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entries of the table, and the largest magnitude of each block: [blocks, 64] and [blocks, 1]."""
    blocks = weight.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    order = table.argsort()
    between = (table[order][1:] + table[order][:-1]) / 2
    return order[torch.bucketize(blocks / absmax, between)], absmax


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    folder = resolve_model("demo", default_cache())
    documentation = "\n\n".join(topics[name].strip() for name in sorted(topics))
    texts = token_blocks(load_tokenizer(folder), [documentation], TOKENS)[-BLOCKS:]
    floats, exact, model = (load_model(folder, torch.float32) for _ in range(3))
    names = [name for name, module in floats.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    rows = []

    def add(table: str, form: str, reference: nn.Module, changed: nn.Module) -> None:
        pairs = [(reference.get_submodule(name).weight, changed.get_submodule(name).weight) for name in names]
        error = sum((b - a).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
        found = qk.compare(reference, changed, texts, layers=False)
        rows.append({"table": table, "form": form, "relative_rms": error.sqrt().item(), **found.to_dict()})
        print(f"{table}, {form}: {rows[-1]['relative_rms']:.4f}\n{found}\n", flush=True)
        options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")

    for kind, table in TABLES.items():
        coded = {name: rounded(floats.get_submodule(name).weight, table) for name in names}
        for name, (codes, absmax) in coded.items():
            weight = exact.get_submodule(name).weight
            weight.copy_((table[codes] * absmax).view_as(weight))
        best, step = table_as_integers(table)
        for integers, levels in ((best.float(), step), ((table * 127).round(), 127)):
            for name, (codes, absmax) in coded.items():
                weight = model.get_submodule(name).weight
                weight.copy_((integers[codes] * (absmax / levels)).view_as(weight))
            add(kind, f"8 bits, step 1/{levels:.0f}", exact, model)
        for name in names:
            weight = exact.get_submodule(name).weight
            stored = qk.quantize_weight(weight, FOUR_BITS)
            model.get_submodule(name).weight.copy_(qk.dequantize_weight(*stored, weight.shape[1], FOUR_BITS))
        add(kind, FOUR_BITS, exact, model)
        add(kind, "the table itself, beside the floats", floats, exact)


if __name__ == "__main__":
    main()
