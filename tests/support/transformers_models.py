"""Tiny models of four families of transformers, and a Trainer for them."""

import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SPECIAL = dict(vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, dict(n_layer=2, n_embd=48, n_head=4, n_positions=64)),
    "bert": (
        BertForSequenceClassification,
        BertConfig,
        dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, num_labels=3),
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80),
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config,
        dict(d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
}


def build(family: str, **changes):
    """A model of two blocks with random weights, in eval mode."""
    torch.manual_seed(0)
    model_class, config_class, sizes = FAMILIES[family]
    return model_class(config_class(**{**SPECIAL, **sizes, **changes})).eval()


def logits(model) -> torch.Tensor:
    ids = torch.arange(3, 19).reshape(2, 8)
    extra = {"decoder_input_ids": ids % 7} if isinstance(model, T5ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = (torch.arange(12) * (i + 1)) % 90 + 3
        return {"input_ids": ids, "labels": ids}


def train(model, folder, **settings):
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Tokens(), eval_dataset=Tokens())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
