"""Checks of two_processes.py: plans of transformers, PEFT on them, and `Trainer` on several processes."""

from __future__ import annotations

import os
from pathlib import Path

import peft
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed import DistributedConfig
from two_processes import assert_processes_agree, assert_same, check, plain_state, raises, rank

import qkernels as qk

LORA = {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "r": 4}


def tokens() -> Tensor:
    return torch.arange(24).view(2, 12) * 7 % 97


def llama(tied: bool = False) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, **sizes, **heads, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def saved(folder: Path, name: str, model: nn.Module) -> Path:
    """The folder `name` with the model, which process 0 writes."""
    if rank() == 0:
        model.save_pretrained(folder / name)
    dist.barrier()
    return folder / name


def load(path: Path, **options) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def load_in_parts(path: Path, **options) -> nn.Module:
    return load(path, distributed_config=DistributedConfig(tp_plan="auto"), **options)


@check
def tp_plan_of_a_float_checkpoint_and_of_a_folder(folder: Path) -> None:
    """Equal logits and tokens; what the two processes save is what one has."""
    for scheme, exact in (("w8a8", True), ("w4a8-g32-asym", False)):
        path = saved(folder, f"float-{scheme}", llama())
        alone = load(path, quantization_config=qk.QKernelsConfig(scheme))
        quantized = saved(folder, f"quantized-{scheme}", alone)
        for model in (
            load_in_parts(path, quantization_config=qk.QKernelsConfig(scheme)),
            load_in_parts(quantized),
        ):
            layer = model.model.layers[0].mlp.down_proj
            assert (
                type(layer) is qk.QuantLinear
                and layer._parameters["qweight"].to_local().shape[1] * 2 == (layer._parameters["qweight"].shape[1])
            )
            with torch.no_grad():
                logits, expected = model(tokens()).logits, alone(tokens()).logits
            assert torch.equal(logits, expected) or not exact
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            generated = [
                net.generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0) for net in (model, alone)
            ]
            assert torch.equal(*generated)
            again = folder / f"again-{scheme}"
            model.save_pretrained(again)
            dist.barrier()
            assert_same(plain_state(load(again)), plain_state(alone))


@check
def tp_plan_with_quantized_embeddings(folder: Path) -> None:
    for tied in (False, True):
        config = qk.QKernelsConfig("w8a8", embeddings=True)
        path = saved(folder, f"embeddings-{tied}", llama(tied))
        alone = load(path, quantization_config=config)
        quantized = saved(folder, f"embeddings-{tied}-quantized", alone)
        for model in (load_in_parts(path, quantization_config=config), load_in_parts(quantized)):
            embedding = model.model.embed_tokens
            assert type(embedding) is qk.QuantEmbedding
            assert tied == (embedding._parameters["qweight"] is model.lm_head._parameters["qweight"])
            with torch.no_grad():
                assert torch.equal(model(tokens()).logits, alone(tokens()).logits)


@check
def lora_on_a_model_in_parts(folder: Path) -> None:
    path = saved(folder, "lora-base", llama())
    config = qk.QKernelsConfig("w8a8")
    models = [load_in_parts(path, quantization_config=config), load(path, quantization_config=config)]
    models = [peft.get_peft_model(model, peft.LoraConfig(**LORA)) for model in models]
    for (name, two), one in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if "lora" in name:
            torch.manual_seed(len(name))
            values = torch.randn(one.shape) * 0.1
            with torch.no_grad():
                one.copy_(values)
                two.copy_(
                    distribute_tensor(values, two.device_mesh, two.placements) if isinstance(two, DTensor) else values
                )
    losses = [model(tokens(), labels=tokens()).loss for model in models]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for (name, two), one in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if "lora" in name:
            grad = two.grad.full_tensor() if isinstance(two.grad, DTensor) else two.grad
            torch.testing.assert_close(grad, one.grad, rtol=1e-3, atol=1e-6)


@check
def what_a_plan_of_transformers_refuses(folder: Path) -> None:
    path = saved(folder, "refused", llama())
    config = qk.QKernelsConfig("w8a8-g128")
    raises(ValueError, "must be a multiple of 128", lambda: load_in_parts(path, quantization_config=config))
    plan = {"model.layers.*.mlp.up_proj": "packed_colwise"}
    raises(
        ValueError,
        "packed_colwise",
        lambda: load(
            path,
            quantization_config=qk.QKernelsConfig("w8a8"),
            distributed_config=DistributedConfig(tp_size=2, tp_plan=plan),
        ),
    )


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(97, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(model: nn.Module, folder: Path, **options) -> list[float]:
    """Losses of two steps of `Trainer`, 4 texts on each process."""
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", seed=0, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Texts())
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@check
def trainer_on_two_processes(folder: Path) -> None:
    """DDP, which `Trainer` sets up by itself, and FSDP2."""
    for mode in ("lora", "qat", "int8"):
        runs = []
        for name, options in (
            ("ddp", {"ddp_backend": "gloo"}),
            ("fsdp", {"fsdp": True, "fsdp_config": {"fsdp_version": 2}}),
        ):
            model = llama()
            qk.quantize_(model, "w8a8", "frozen" if mode == "lora" else mode, skip=["lm_head"])
            if mode == "lora":
                model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
            runs.append(train(model, folder / f"trainer-{mode}-{name}", **options))
            if name == "ddp":
                assert_processes_agree(plain_state(model))
        assert len(runs[0]) == 2 and runs[0][1] != runs[0][0]
        torch.testing.assert_close(*runs, rtol=1e-3 if mode != "int8" else 0.05, atol=0)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
