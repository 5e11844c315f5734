"""Text files to blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

HELD_OUT_SHARE = 10


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The contents of UTF-8 text files.

    Raises:
        InputError: if a file is missing, not UTF-8, or holds white space only.
    """
    texts = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} must be UTF-8 text: {error.reason} at byte {error.start}") from error
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        if not text.strip():
            raise InputError(f"{path} is empty")
        texts.append(text)
    return texts


def token_blocks(tokenizer: Any, texts: Sequence[str], seq_len: int, *, keep_tail: bool = False) -> list[Tensor]:
    """Cut texts into blocks of `seq_len` tokens.

    The texts are joined by the end-of-sequence token, and every block starts with the beginning-of-sequence token
    where the tokenizer has one: models such as Gemma predict nonsense without it.

    Args:
        tokenizer: a transformers tokenizer.
        texts: the documents, in order.
        seq_len: tokens in a block, at least 8.
        keep_tail: keep the last block though it is shorter; otherwise its tokens are dropped.

    Returns:
        int64 tensors [seq_len], the last one possibly shorter under `keep_tail`.
    """
    if seq_len < 8:
        raise InputError(f"the sequence length must be at least 8 tokens, got {seq_len}")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        if stream and eos is not None:
            stream.append(eos)
        stream += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    start = [] if bos is None else [bos]
    content = seq_len - len(start)
    blocks = [torch.tensor(start + stream[at : at + content]) for at in range(0, len(stream), content)]
    complete = [block for block in blocks if len(block) == seq_len]
    # A block of one token predicts nothing.
    return [block for block in blocks if len(block) > 1] if keep_tail else complete


def check_tokenizers(a: Any, b: Any, texts: Sequence[str]) -> None:
    """Refuse tokenizers by which the same token ids are not the same text.

    Raises:
        InputError: naming the first difference.
    """
    of_a, of_b = ({token: tokenizer_id for tokenizer_id, token in t.get_vocab().items()} for t in (a, b))
    for token in of_a.keys() & of_b.keys():
        if of_a[token] != of_b[token]:
            raise InputError(
                f"the tokenizers differ: token {token} is {of_a[token]!r} for the first model, "
                f"{of_b[token]!r} for the other"
            )
    for text in texts:
        ids = [t(text, add_special_tokens=False, verbose=False).input_ids for t in (a, b)]
        if ids[0] != ids[1]:
            at = next((i for i, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1]), min(map(len, ids)))
            raise InputError(
                f"the tokenizers differ: token {at} of the text is {ids[0][at : at + 1]} for the first model, "
                f"{ids[1][at : at + 1]} for the other"
            )
    if a.bos_token_id != b.bos_token_id:
        raise InputError(
            f"the tokenizers differ: a text begins with token {a.bos_token_id} for the first model, "
            f"{b.bos_token_id} for the other"
        )


def split_blocks(blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Training blocks and held-out blocks: the last tenth of the text, at least one block.

    Raises:
        InputError: if there are fewer than two blocks.
    """
    if len(blocks) < 2:
        raise InputError(
            f"the text is too short: it gives {len(blocks)} block(s) of the sequence length, and at least two are "
            "needed, one to train on and one held out; give more text or a smaller --seq-len"
        )
    held_out = max(1, len(blocks) // HELD_OUT_SHARE)
    return list(blocks[:-held_out]), list(blocks[-held_out:])


def evenly_spread(blocks: list[Tensor], count: int) -> list[Tensor]:
    """`count` of the blocks, spread evenly over the text; all of them if there are fewer."""
    count = min(count, len(blocks))
    return [blocks[index * len(blocks) // count] for index in range(count)]
