"""A tokenizer of transformers as the vocabulary of a GGUF file, for the kinds of tokenizers that llama.cpp has."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SPACE = "\u2581"  # what SentencePiece has for a space
_ADDED_SCORE = -1000.0  # of tokens that no merge gives, as llama.cpp's converter has it
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<unused\d+>")  # for llama.cpp these are no text, whatever a tokenizer says
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of them is a tokenizer
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")

# Regular expressions of the pre-tokenizers, by llama.cpp's names of them.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}


class UnknownTokenizer(ValueError):
    """A tokenizer that is none of llama.cpp's, or is not known to be one."""


def add_vocabulary(writer: GGUFWriter, tokenizer: Any, config: Any) -> None:
    """Add the vocabulary, the special tokens and the chat template to the metadata of a GGUF file.

    Args:
        writer: of the package gguf.
        tokenizer: of transformers, one of the library tokenizers.
        config: of transformers. Tokens of no use fill the vocabulary up to the rows of the embedding.

    Raises:
        UnknownTokenizer: if llama.cpp has none that gives the same tokens, or its name is not known here.
    """
    rows = config.vocab_size
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnknownTokenizer(f"{type(tokenizer).__name__} is no tokenizer of the library tokenizers")
    found = json.loads(backend.to_str())
    model = found["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnknownTokenizer(f"the tokenizer has a {model['type']} model that is not written")
    vocabulary = dict(model["vocab"]) | {token["content"]: token["id"] for token in found["added_tokens"]}
    if (largest := max(vocabulary.values())) >= rows:
        raise UnknownTokenizer(f"the tokenizer has a token {largest}, the embedding only {rows} rows")
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, found, vocabulary, rows)
    else:
        _add_byte_level(writer, found, vocabulary, rows)
    _add_special(writer, tokenizer, config)


def _add_byte_level(writer: GGUFWriter, found: dict[str, Any], vocabulary: dict[str, int], rows: int) -> None:
    name = _pre_tokenizer(found)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in found["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    tokens, types = _tokens(found, vocabulary, rows)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{left} {right}" for left, right in merges])


def _pre_tokenizer(found: dict[str, Any]) -> str:
    """The name that llama.cpp has for how a tokenizer cuts a text into words."""
    steps = _steps(found["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    name = None
    if kinds[-1:] == ["ByteLevel"] and not steps[-1]["add_prefix_space"]:
        if kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            name = None if steps[1]["use_regex"] else _SPLITS.get(steps[0]["pattern"].get("Regex"))
        elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
            name = "smollm"
        elif kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            name = "gpt-2"
    if name is None:
        raise UnknownTokenizer("the regular expressions of the tokenizer's pre_tokenizer are none that are known")
    normalizers = [step["type"] for step in _steps(found["normalizer"], "normalizers")]
    if normalizers not in ([], ["NFC"]) or (normalizers and name != "qwen2"):
        raise UnknownTokenizer(f"the tokenizer changes texts ({', '.join(normalizers)}), which llama.cpp does not")
    if bool(found["model"].get("ignore_merges")) != (name == "llama-bpe"):
        raise UnknownTokenizer(f"ignore_merges of the tokenizer is not that of {name} in llama.cpp")
    return name


def _steps(found: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if found is None:
        return []
    return list(found[key]) if found["type"] == "Sequence" else [found]


def _add_sentencepiece(writer: GGUFWriter, found: dict[str, Any], vocabulary: dict[str, int], rows: int) -> None:
    prefixed = _prefixed(found)
    tokens, types = _tokens(found, vocabulary, rows)
    scores = _scores(found["model"], {token["content"] for token in found["added_tokens"]})
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([scores.get(token, _ADDED_SCORE) for token in tokens])
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefixed)


def _prefixed(found: dict[str, Any]) -> bool:
    """Whether a tokenizer puts a space before a text, as SentencePiece can."""
    steps = _steps(found["normalizer"], "normalizers") + _steps(found["pre_tokenizer"], "pretokenizers")
    prefixed, replaces = False, False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == _SPACE:
            prefixed = True
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            replaces = True
        elif kind == "Metaspace" and step["replacement"] == _SPACE and not step.get("split", True):
            replaces, prefixed = True, step["prepend_scheme"] != "never"
            if step["prepend_scheme"] == "first":
                what = "the tokenizer puts a space before the first word only; llama.cpp puts one after each special"
                warnings.warn(f"{what} token, too", stacklevel=2)
        elif not (replaces and kind == "Split" and step["pattern"] == {"String": " "}):  # there is none any more
            raise UnknownTokenizer(f"the tokenizer has a step {kind} that SentencePiece has not")
    if not replaces:
        raise UnknownTokenizer("the tokenizer does not replace spaces as SentencePiece does")
    return prefixed


def _scores(model: dict[str, Any], added: set[str]) -> dict[str, float]:
    """The scores by which SentencePiece merges as the merges of a tokenizer say: the sooner, the higher.

    llama.cpp merges any two tokens whose text is a token's, that of the highest score first, so all merges that give a
    token must stand together, and each pair of tokens that could give it must be one of them.
    """
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    vocabulary, pairs, last = model["vocab"], set(merges), None
    scores: dict[str, float] = {}
    for left, right in merges:
        token = left + right
        if token in added or token == last:
            continue
        if token in scores:
            raise UnknownTokenizer(f"the merges of the tokenizer that give {token!r} do not stand together")
        scores[token], last = float(-len(scores)), token
    plain = [token for token in vocabulary if token not in added and not _BYTE.fullmatch(token)]
    for token in plain:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in pairs:
                raise UnknownTokenizer(f"the tokenizer does not merge {pair[0]!r} and {pair[1]!r}, SentencePiece does")
    single = [token for token in plain if token not in scores]
    return scores | {token: float(-len(scores) - index) for index, token in enumerate(single)}


def _tokens(found: dict[str, Any], vocabulary: dict[str, int], rows: int) -> tuple[list[str], list[int]]:
    """The text and the type of each token."""
    from gguf import TokenType

    pieces = bool(found["model"].get("byte_fallback"))
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [int(TokenType.UNUSED)] * rows
    for token, index in vocabulary.items():
        is_byte = pieces and _BYTE.fullmatch(token)
        tokens[index], types[index] = token, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in found["added_tokens"]:
        token, index = added["content"], added["id"]
        if added["special"] or _LOOKS_SPECIAL.fullmatch(token):
            types[index] = int(TokenType.CONTROL)
        else:
            types[index] = int(TokenType.USER_DEFINED)
            tokens[index] = token.replace(_SPACE, " ") if pieces else token
    return tokens, types


def _add_special(writer: GGUFWriter, tokenizer: Any, config: Any) -> None:
    """Add which tokens are special, which of them every text gets, and the chat template."""
    for name in _SPECIAL:
        index = getattr(tokenizer, f"{name}_token_id")
        if index is None:
            index = getattr(config, f"{name}_token_id", None)
        if isinstance(index, int) and 0 <= index < config.vocab_size:
            getattr(writer, f"add_{name}_token_id")(index)
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    begins = whole[:1] == [tokenizer.bos_token_id] and whole != plain
    ends = whole[-1:] == [tokenizer.eos_token_id] and whole != plain
    if whole != [tokenizer.bos_token_id] * begins + plain + [tokenizer.eos_token_id] * ends:
        raise UnknownTokenizer("the tokenizer adds other tokens to a text than one that begins and one that ends it")
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        UnknownTokenizer: if there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((folder / name).is_file() for name in _FILES):
        raise UnknownTokenizer(
            "there is no tokenizer beside the model: save it there, or export with like=FOLDER that has one"
        )
    # What tokenizer.json says: the class that a config names may build another pre_tokenizer.
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(folder)
    except Exception as error:  # whatever is missing or broken there
        raise UnknownTokenizer(f"transformers cannot read a tokenizer of the model: {error}") from error
