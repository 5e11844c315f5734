"""How far quantized Gemma-3-270M is from the float model: `qk.compare` by scheme and by kind of text.

The layers are rounded to nearest, and the head, tied to the embedding, stays in float. The first text is the tail of
Python's documentation; more are given as files. Each is cut into blocks of 256 tokens behind the beginning-of-sequence
token.

    python benchmarks/divergence.py --text licence=/usr/share/common-licenses/GPL-3 --output divergence.json
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from tqdm import tqdm

import qkernels as qk
from qkernels.bench.results import machine
from qkernels.finetune import load_model, load_tokenizer, read_texts, resolve_model, token_blocks
from qkernels.finetune.models import default_cache

SCHEMES = ("w8a16", "w8a8-ag32", "w8a8", "w4a16-g32-asym", "w4a8-g32-asym")
DOCUMENTATION = "Python's documentation"
BLOCK, BLOCKS = 256, 6


def blocks_of(files: list[str], tokenizer: object) -> dict[str, list[Tensor]]:
    documentation = "\n\n".join(topics[name].strip() for name in sorted(topics))
    found = {DOCUMENTATION: token_blocks(tokenizer, [documentation], BLOCK)[-BLOCKS:]}
    for given in files:
        name, _, path = given.rpartition("=")
        found[name or Path(path).stem] = token_blocks(tokenizer, read_texts([Path(path)]), BLOCK)[:BLOCKS]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    folder = resolve_model("demo", default_cache())
    texts, reference, rows = blocks_of(options.text, load_tokenizer(folder)), load_model(folder, torch.float32), []
    for scheme in SCHEMES:
        model = load_model(folder, torch.float32)
        qk.quantize_(model, scheme)
        for name, blocks in texts.items():
            found = qk.compare(reference, model, tqdm(blocks, desc=f"{scheme}, {name}", leave=False))
            facts = found.to_dict()
            worst = max(facts.pop("layers"), key=lambda row: row["error"])
            rows.append({"scheme": scheme, "text": name, **facts, "worst_layer": worst})
            print(f"{scheme}, {name}\n{found}\n", flush=True)
            options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
