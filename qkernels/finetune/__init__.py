"""Fine-tuning, evaluation and generation behind the console script, as importable functions."""

from .errors import InputError
from .generation import generate_text
from .measure import perplexity
from .models import load_adapter, load_model, load_tokenizer, resolve_model
from .settings import FinetuneSettings
from .text import read_texts, token_blocks
from .train import finetune

__all__ = [
    "FinetuneSettings",
    "InputError",
    "finetune",
    "generate_text",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "perplexity",
    "read_texts",
    "resolve_model",
    "token_blocks",
]
