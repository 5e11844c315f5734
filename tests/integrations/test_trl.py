"""TRL's trainers, which multiply `lm_head.weight` themselves, on quantized models: the loss is that of the model."""

import pytest
import torch
import transformers
from peft import LoraConfig

import qkernels as qk

pytest.importorskip("trl")
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [" ".join(f"w{(7 * i + 3 * j) % 60 + 4}" for j in range(12)) for i in range(8)]


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<p>": 0, "<s>": 1, "</s>": 2, "<u>": 3} | {f"w{i}": i for i in range(4, 64)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<p>", bos_token="<s>", eos_token="</s>", unk_token="<u>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def llama(how, tmp_path, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, pad_token_id=0)).to(dtype)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    if how == "config":
        model.save_pretrained(tmp_path / "float")
        config = qk.QKernelsConfig("w8a8", mode="frozen")
        return transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "float", quantization_config=config, dtype=dtype
        )
    if how != "float":
        qk.quantize_(model, "w4a8-g32" if how == "frozen w4" else "w8a8", how if how in ("qat", "int8") else "frozen")
    return model


def arguments(kind, tmp_path, **options):
    fixed = dict(max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no", seed=0)
    return kind(str(tmp_path / "out"), disable_tqdm=True, learning_rate=1e-2, **fixed, **options)


def first_loss(trainer):
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["frozen w8", "frozen w4", "config", "qat", "int8"])
def test_the_loss_of_sft_is_that_of_the_model(how, dtype, tokenizer, tmp_path):
    model = llama(how, tmp_path, dtype)
    assert type(model.lm_head) is qk.QuantLinear
    ids = torch.tensor([[*tokenizer(row).input_ids, 2] for row in ROWS[:4]])
    with torch.no_grad():
        plain = model(input_ids=ids, labels=ids).loss.item()
    adapters = None if how in ("qat", "int8") else LoraConfig(target_modules="all-linear")
    options = arguments(SFTConfig, tmp_path, bf16=False, logging_steps=1, gradient_checkpointing=False)
    data = Dataset.from_dict({"text": ROWS[:4]})
    trainer = SFTTrainer(model, args=options, train_dataset=data, processing_class=tokenizer, peft_config=adapters)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    loss = first_loss(trainer)
    # Without the rounding of the head's input the loss would be off by more than that in float32 already.
    assert abs(loss - plain) < (2e-5 if dtype == torch.float32 else 2e-2) * plain
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None or p.grad.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("how", ["frozen w8", "qat"])
def test_dpo_trains(how, tokenizer, tmp_path):
    data = Dataset.from_dict({"prompt": ["w5"] * 4, "chosen": ["w7 w8"] * 4, "rejected": ["w9"] * 4})
    adapters = LoraConfig(target_modules=["q_proj"]) if how == "frozen w8" else None
    options = arguments(DPOConfig, tmp_path, bf16=False, logging_steps=1)
    model, reference = llama(how, tmp_path), llama(how, tmp_path) if adapters is None else None
    trainer = DPOTrainer(
        model, reference, args=options, train_dataset=data, processing_class=tokenizer, peft_config=adapters
    )
    assert abs(first_loss(trainer) - 0.6931) < 1e-3


def test_grpo_trains(tokenizer, tmp_path):
    data = Dataset.from_dict({"prompt": ["w5 w6"] * 8})
    options = arguments(GRPOConfig, tmp_path, bf16=False, logging_steps=1, num_generations=2, max_completion_length=4)
    trainer = GRPOTrainer(
        llama("frozen w8", tmp_path),
        args=options,
        train_dataset=data,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **rest: [float(len(text)) for text in completions],
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    trainer.train()
    assert trainer.state.global_step == 2
