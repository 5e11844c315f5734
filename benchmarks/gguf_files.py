"""GGUF files of real models: the memory that a load takes, and what qkernels and llama.cpp make of the same tokens.

Memory is that of a new process, above what it has with its libraries. The text is the tail of Python's documentation,
in blocks behind the beginning-of-sequence token. llama.cpp rounds activations to int8 itself, by blocks of 32 (of 256
before weights of Q4_K, Q5_K and Q6_K): that is the like of our int8 activations. The like of float ones is llama.cpp
with the same values in a file of F32. `--flow` trains an adapter on the integers of each file, merges it, writes a GGUF
file and lets both continue the same prompts.

    python benchmarks/gguf_files.py gemma-3-270m-q4_k_m.gguf SmolLM2-135M-Instruct.Q4_1.gguf --output gguf.json
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import qkernels as qk
from qkernels.bench.results import machine
from qkernels.checkpoints.registry import open_checkpoint
from qkernels.finetune.measure import PeakMemory
from qkernels.system import heap

BLOCK = 256
ACTIVATIONS = ("float", "int8")
PROMPTS = (
    "A for statement is used to iterate over",
    "The capital of France is",
    "Once upon a time, a fox",
    "Water boils at",
    "def fibonacci(n):",
)
NEW_TOKENS = 32
STEPS, TRAINING_BLOCKS = 8, 4


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.model = Llama(
            str(path), n_ctx=BLOCK, n_batch=BLOCK, n_threads=threads, n_threads_batch=threads, logits_all=True,
            verbose=False,
        )  # fmt: skip

    def tokens(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=False, special=False)

    def logits(self, tokens: list[int]) -> Tensor:
        """float32 [T, V], which the next call overwrites."""
        self.model.reset()
        self.model.eval(tokens)
        return torch.from_numpy(self.model.scores[: len(tokens)])

    def continued(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        """The likeliest tokens one after the other, and by how much each logit is above the second."""
        self.logits(prompt)
        tokens, gaps = [], []
        for _ in range(NEW_TOKENS):
            first, second = torch.from_numpy(self.model.scores[self.model.n_tokens - 1]).topk(2)
            tokens.append(int(second[0]))
            gaps.append(float(first[0] - first[1]))
            self.model.eval(tokens[-1:])
        return tokens, gaps

    def close(self) -> None:
        self.model.close()


def cut(tokens: list[int], bos: int) -> list[list[int]]:
    step = BLOCK - 1
    return [[bos, *tokens[at : at + step]] for at in range(0, len(tokens) - step + 1, step)]


def load_something_like(path: Path) -> None:
    """Bring all libraries that a load of `path` needs into memory, with a tiny model of its class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(open_checkpoint(path).config["model_type"], **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config)
    qk.quantize_(model, "w8a16-g32")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        qk.load(folder)


def memory(path: Path) -> dict[str, int]:
    """Bytes above what the process has with its libraries."""
    import psutil

    def resident() -> int:
        gc.collect()
        heap.trim()
        return psutil.Process().memory_info().rss

    load_something_like(path)
    before = resident()
    with PeakMemory() as peak:
        model = qk.load(path)
    after = resident()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "file_bytes": path.stat().st_size,
        "peak": peak.bytes - before,
        "loaded": after - before,
        "stored": parameters,
    }


def memory_of_a_process(path: Path) -> dict[str, int]:
    command = [sys.executable, __file__, str(path), "--memory"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def token_losses(logits: Tensor, block: list[int]) -> Tensor:
    """float64 [T - 1]: of each token after the first."""
    return F.cross_entropy(logits[:-1].float(), torch.tensor(block[1:]), reduction="none").double()


def losses_of(model: nn.Module, blocks: list[list[int]], label: str) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [token_losses(model(torch.tensor([b])).logits[0], b) for b in tqdm(blocks, desc=label, leave=False)]
        )


def losses_of_llama_cpp(path: Path, blocks: list[list[int]]) -> Tensor:
    engine = LlamaCpp(path)
    labelled = tqdm(blocks, desc="llama.cpp", leave=False)
    found = torch.cat([token_losses(engine.logits(block), block) for block in labelled])
    engine.close()
    return found


def perplexities(path: Path, blocks: list[list[int]]) -> Iterator[dict]:
    """A row for each kind of activations: perplexity, and its change against llama.cpp's like on the same tokens."""
    for activations in ACTIVATIONS:
        model = qk.load(path, activations=activations)
        ours = losses_of(model, blocks, activations)
        if activations == "int8":
            theirs = losses_of_llama_cpp(path, blocks)
        else:
            with tempfile.TemporaryDirectory() as folder:
                in_float = Path(folder) / "f32.gguf"
                qk.export(model, in_float, "gguf:f32", like=path, on_loss="report")
                theirs = losses_of_llama_cpp(in_float, blocks)
        change = ours - theirs
        yield {
            "activations": activations,
            "tokens": len(ours),
            "perplexity": math.exp(ours.mean()),
            "llama.cpp": math.exp(theirs.mean()),
            "change": math.expm1(change.mean()),
            "standard_error": float(change.std() / len(change) ** 0.5),
        }


def greedy(model: nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]


def compare_continuations(model: nn.Module, path: Path, prompts: list[list[int]]) -> list[dict]:
    """Of each prompt: how many tokens are the same before the first that is not, and llama.cpp's gap there."""
    engine, rows = LlamaCpp(path), []
    for prompt, ours in zip(prompts, greedy(model, prompts), strict=True):
        theirs, gaps = engine.continued(prompt)
        same = next((at for at in range(NEW_TOKENS) if ours[at] != theirs[at]), NEW_TOKENS)
        gap = None if same == NEW_TOKENS else gaps[same]
        rows.append({"same": same, "gap": gap, "median_gap": sorted(gaps)[NEW_TOKENS // 2]})
    engine.close()
    return rows


def flow(path: Path, training: list[list[int]], held_out: list[list[int]], prompts: list[list[int]]) -> dict:
    """An adapter that is trained on the integers of the file, merged, and served by llama.cpp."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = qk.load(path, activations="int8")
    found = {"imported": compare_continuations(model, path, prompts)}
    before = losses_of(model, held_out, "held out").mean()
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    for step in tqdm(range(STEPS), desc="training", leave=False):
        ids = torch.tensor([training[step % len(training)]])
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = losses_of(adapted.eval(), held_out, "tuned").mean()
    merged = adapted.merge_and_unload()
    after = losses_of(merged, held_out, "merged").mean()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "merged.gguf"
        lost = qk.export(merged, written, "gguf", like=path, on_loss="requantize")
        found["exported"] = compare_continuations(merged, written, prompts)
        again = qk.load(written, activations="int8")
        found["exported, read again"] = compare_continuations(again, written, prompts)
        theirs = losses_of_llama_cpp(written, held_out).mean()
    losses = {"before": before, "adapter": tuned, "merged": after, "llama.cpp": theirs}
    return {
        "perplexity": {name: math.exp(loss) for name, loss in losses.items()},
        "lost": {"tensors": len(lost), "largest": max((loss.largest for loss in lost), default=0.0)},
        "continuations": found,
    }


def measure(name: str, path: Path, blocks: int, whole_flow: bool) -> Iterator[dict]:
    facts = {"model": name, "file": path.name}
    if not whole_flow:
        yield {**facts, "kind": "memory", **memory_of_a_process(path)}
    engine = LlamaCpp(path)
    bos = engine.model.token_bos()
    documentation = "\n\n".join(topics[topic].strip() for topic in sorted(topics))
    found = cut(engine.tokens(documentation[-BLOCK * 8 * (blocks + TRAINING_BLOCKS) :]), bos)
    prompts = [[bos, *engine.tokens(prompt)] for prompt in PROMPTS]
    chosen = found[-blocks:]
    engine.close()
    if whole_flow:
        yield {**facts, "kind": "flow", **flow(path, found[:TRAINING_BLOCKS], chosen, prompts)}
    else:
        yield from ({**facts, "kind": "perplexity", **row} for row in perplexities(path, chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="[NAME=]FILE")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--blocks", type=int, default=16, help=f"of {BLOCK} tokens, that are predicted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--flow", action="store_true", help="train, merge, export and continue instead")
    parser.add_argument("--memory", action="store_true", help="print what loading one file takes, and no more")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict] = []
    for given in options.files:
        name, _, file = given.rpartition("=")
        path = Path(file)
        if options.memory:
            print(json.dumps(memory(path)))
            continue
        for row in measure(name or path.stem, path, options.blocks, options.flow):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.output is not None:
                options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
