"""GPT-2 with quantized layers, embeddings and head: a short float training, then LoRA on top, all with `Trainer`.

The text is Python's own documentation, the tokenizer is trained on the spot, and the weights start at random, so
nothing is downloaded. Run: python examples/gpt2_trainer.py --steps 200
"""

import argparse
import pydoc_data.topics
import tempfile

import peft
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

import qkernels as qk

BLOCK = 64  # tokens in an example


def tokenize(texts: list[str]) -> tuple[PreTrainedTokenizerFast, torch.Tensor]:
    """A byte-level BPE tokenizer trained on the texts, and their tokens in blocks [blocks, BLOCK]."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1024, special_tokens=["<end>"], show_progress=False)
    tokens = [token for encoding in bpe.encode_batch(texts) for token in (*encoding.ids, 0)]
    blocks = torch.tensor(tokens[: len(tokens) // BLOCK * BLOCK]).view(-1, BLOCK)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>")
    return tokenizer, blocks


def trainer(model: torch.nn.Module, blocks: torch.Tensor, steps: int, rate: float, folder: str) -> Trainer:
    held_out = len(blocks) // 20
    data = [{"input_ids": block, "labels": block} for block in blocks]
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=rate, warmup_steps=max(1, steps // 10),
        lr_scheduler_type="cosine", weight_decay=0.01, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data[held_out:], eval_dataset=data[: min(held_out, 64)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--steps", type=int, default=200, help="of the float training and of the LoRA training")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    set_seed(0)
    tokenizer, blocks = tokenize(list(pydoc_data.topics.topics.values()))
    sizes = {"n_layer": options.layers, "n_embd": options.width, "n_head": 4, "n_positions": 2 * BLOCK}
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **sizes))

    with tempfile.TemporaryDirectory() as folder:
        first = trainer(model, blocks, options.steps, 1e-3, folder)
        first.train()
        print(f"held-out loss in float:       {first.evaluate()['eval_loss']:.3f}")

        # Embeddings too, so that the tied head is quantized, and its loss can be computed with it in one product.
        print(qk.quantize_(model, options.scheme, grad_dtype="int8", embeddings=True))
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        model = peft.get_peft_model(model, lora)
        second = trainer(model, blocks, options.steps, 1e-2, folder)
        print(f"held-out loss in {options.scheme}:  {second.evaluate()['eval_loss']:.3f}")
        with qk.patch_loss(model):
            second.train()
        print(f"held-out loss after LoRA:     {second.evaluate()['eval_loss']:.3f}")

    prompt = tokenizer("The following sections describe", return_tensors="pt", return_token_type_ids=False)
    for name, beams in (("greedy", 1), ("beam search", 4)):
        tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, num_beams=beams, pad_token_id=end)
        print(f"{name}: {tokenizer.decode(tokens[0])!r}")
