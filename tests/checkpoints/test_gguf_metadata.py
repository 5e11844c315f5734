"""GGUF files of folders of transformers that no GGUF file was ever made of: metadata, vocabulary, llama.cpp."""

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qkernels.checkpoints.gguf_file import GGUFFile
from qkernels.checkpoints.gguf_vocabulary import _SPLITS
from qkernels.checkpoints.losses import Losses
from qkernels.checkpoints.registry import open_checkpoint, parse_target

TEXT = ["the cat sat on the mat, and the hat.", "It's 2024: 12345 cats\n\n  in   hats!", "naïve café, 日本 🙂\tthe end"]
REGEX = {name: regex for regex, name in _SPLITS.items()}
TYPES = gguf.TokenType


def split_by(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre_tokenizer that tokenizers of this name in llama.cpp have."""
    if name in REGEX:
        split = pre_tokenizers.Split(tokenizers.Regex(REGEX[name]), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return whole if name == "gpt-2" else pre_tokenizers.Sequence([digits, whole])


def byte_level(name: str, bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split_by(name), decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens(["<think>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentencepiece(prefixed: bool) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with every merge that SentencePiece would make with these pieces."""
    space = "\u2581"
    first = Tokenizer(models.BPE())
    first.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    first.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=90))
    merged = sorted((t for t in first.get_vocab() if len(t) > 1), key=first.get_vocab().get)
    single = sorted({*(t for t in first.get_vocab() if len(t) == 1), space})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *single]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(t[:c], t[c:]) for t in merged for c in range(1, len(t)) if t[:c] in vocab and t[c:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", space)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), replace]) if prefixed else replace
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(["<unused0>", "<think>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 16, "vocab_size": 400}  # fmt: skip


def write_folder(path: Path, kind: str, tokenizer: transformers.PreTrainedTokenizerFast, **settings: object) -> Path:
    """A folder of a tiny float model, as transformers writes one."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(std=0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def written(folder: Path, target: str = "f32") -> GGUFFile:
    out = folder.with_suffix(".gguf")
    parse_target("gguf")[0].write(open_checkpoint(folder), out, Losses(), target)
    return GGUFFile(out)


CASES = {
    "llama": (lambda: byte_level("llama-bpe", bos=True), {}),
    "mistral": (lambda: sentencepiece(True), {"sliding_window": 64}),
    "qwen2": (lambda: byte_level("qwen2"), {}),
    "qwen3": (lambda: byte_level("qwen2"), {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 64}}),
    "gemma3_text": (lambda: sentencepiece(False), {"query_pre_attn_scalar": 16, "sliding_window": 32}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_a_folder_of_transformers_becomes_a_file_that_says_the_same_of_the_model(tmp_path, kind):
    make, settings = CASES[kind]
    folder = write_folder(tmp_path / "tiny", kind, make(), **settings)
    found = open_checkpoint(written(folder).path)
    ours = transformers.AutoConfig.for_model(**found.config)
    theirs = transformers.AutoConfig.from_pretrained(folder)
    if kind == "mistral":  # for llama.cpp it is a llama whose texts are no longer than its window
        theirs = transformers.LlamaConfig(**{**SMALL, "max_position_embeddings": 64, "tie_word_embeddings": False,
                                             "rms_norm_eps": theirs.rms_norm_eps, "eos_token_id": 2})  # fmt: skip
    names = (*SMALL, "rms_norm_eps", "tie_word_embeddings")
    assert {n: getattr(ours, n) for n in names if n != "head_dim" or kind != "qwen2"} == pytest.approx(
        {n: getattr(theirs, n) for n in names if n != "head_dim" or kind != "qwen2"}
    )
    assert json.dumps(ours.rope_parameters, sort_keys=True) == json.dumps(theirs.rope_parameters, sort_keys=True)
    tensors = {name: tensor.read() for name, tensor in open_checkpoint(folder).floats.items()}
    assert found.floats.keys() == tensors.keys()
    assert all(torch.allclose(found.floats[name].read(), values, atol=1e-6) for name, values in tensors.items())


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "gpt-2", "smollm"])
def test_byte_level_vocabularies(tmp_path, name):
    tokenizer = byte_level(name, bos=name == "llama-bpe")
    tokenizer.chat_template = "{{ messages }}"
    file = written(write_folder(tmp_path / "tiny", "llama", tokenizer))
    assert (file.value("tokenizer.ggml.model"), file.value("tokenizer.ggml.pre")) == ("gpt2", name)
    tokens, types = file.array("tokenizer.ggml.tokens"), file.array("tokenizer.ggml.token_type")
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[len(tokenizer) :] == [f"[PAD{index}]" for index in range(len(tokenizer), 400)]
    think = tokens.index("<think>")
    assert [types[i] for i in (0, 2, think, 399)] == [TYPES.CONTROL, TYPES.NORMAL, TYPES.USER_DEFINED, TYPES.UNUSED]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert file.array("tokenizer.ggml.merges") == [" ".join(merge) for merge in merges]
    assert file.value("tokenizer.ggml.add_bos_token") == (name == "llama-bpe")
    assert (file.value("tokenizer.ggml.bos_token_id"), file.value("tokenizer.ggml.eos_token_id")) == (0, 1)
    assert file.value("tokenizer.chat_template") == "{{ messages }}"


@pytest.mark.parametrize("prefixed", [True, False])
def test_pieces_have_scores_in_the_order_of_their_merges(tmp_path, prefixed):
    tokenizer = sentencepiece(prefixed)
    file = written(write_folder(tmp_path / "tiny", "llama", tokenizer))
    assert file.value("tokenizer.ggml.model") == "llama" and file.value("tokenizer.ggml.add_space_prefix") is prefixed
    tokens, types, scores = (file.array(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "scores"))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    results = list(dict.fromkeys("".join(merge) for merge in merges))
    assert [scores[tokens.index(token)] for token in results] == [-float(index) for index in range(len(results))]
    kinds = {"<s>": TYPES.CONTROL, "<0x0A>": TYPES.BYTE, "<think>": TYPES.USER_DEFINED, "<unused0>": TYPES.CONTROL}
    assert {token: types[tokens.index(token)] for token in kinds} == kinds
    assert file.value("tokenizer.ggml.add_bos_token") and not file.value("tokenizer.ggml.add_eos_token")


def test_factors_of_llama_3(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    folder = write_folder(tmp_path / "tiny", "llama", byte_level("llama-bpe"), rope_parameters=rope)
    found = open_checkpoint(written(folder).path).config["rope_parameters"]
    assert {**found, "factor": round(found["factor"], 4)} == rope


@pytest.mark.parametrize(("target", "kinds"), [("q8_0", {"Q8_0"}), ("q4_0", {"Q4_0", "Q8_0"}), ("bf16", {"BF16"})])
def test_layers_in_float_get_the_type_that_is_asked_for(tmp_path, target, kinds):
    folder = write_folder(tmp_path / "tiny", "llama", byte_level("gpt-2"))
    file = written(folder, "f32")
    out, losses = tmp_path / "out.gguf", Losses("report" if target == "bf16" else "refuse")
    parse_target("gguf")[0].write(open_checkpoint(folder), out, losses, target)
    matrices = [tensor for tensor in GGUFFile(out).tensors.values() if len(tensor.shape) == 2]
    assert {tensor.kind for tensor in matrices} == kinds
    assert len(losses.entries) == len(matrices) and all(loss.changed for loss in losses.entries)
    for tensor in matrices:
        exact = file.bytes_of(file.tensors[tensor.name]).view(torch.float32)
        kind = gguf.GGMLQuantizationType[tensor.kind]
        read = gguf.quants.dequantize(GGUFFile(out).bytes_of(tensor).numpy(), kind)
        step = {"Q8_0": 1 / 127, "Q4_0": 1 / 7, "BF16": 1 / 256}[tensor.kind]
        assert (torch.from_numpy(read) - exact).abs().max() <= step * exact.abs().max()


def broken_tokenizers() -> dict[str, transformers.PreTrainedTokenizerFast]:
    cut = byte_level("gpt-2")
    cut.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(r"\w+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip
    lower = byte_level("gpt-2")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    ignoring = byte_level("gpt-2")
    ignoring.backend_tokenizer.model.ignore_merges = True
    merges = sentencepiece(True)
    model = json.loads(merges.backend_tokenizer.to_str())
    model["model"]["merges"] = model["model"]["merges"][1:]
    fewer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(model)))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    return {
        "regular expressions": cut, r"changes texts \(Lowercase\)": lower, "ignore_merges": ignoring,
        "does not merge": fewer, "has a WordLevel model": words,
    }  # fmt: skip


@pytest.mark.parametrize("message", broken_tokenizers())
def test_a_tokenizer_that_llama_cpp_has_not_needs_a_template(tmp_path, message):
    folder = write_folder(tmp_path / "tiny", "llama", broken_tokenizers()[message])
    with pytest.raises(ValueError, match=f"{message}.*; give a template: .* beside the model as template.gguf"):
        written(folder)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny"]


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    folder = write_folder(tmp_path / "tiny", "llama", byte_level("gpt-2"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer beside the model: .*like=FOLDER.*; give a template: "):
        written(folder)


def test_a_space_before_the_first_word_only_is_told(tmp_path):
    tokenizer = sentencepiece(False)
    tokenizer.backend_tokenizer.normalizer = None
    space = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.backend_tokenizer.pre_tokenizer = space
    folder = write_folder(tmp_path / "tiny", "llama", tokenizer)
    with pytest.warns(UserWarning, match="a space before the first word only"):
        file = written(folder)
    assert file.value("tokenizer.ggml.add_space_prefix") is True


@pytest.mark.parametrize(("kind", "settings", "message"), [
    ("phi3", {"pad_token_id": 0}, "made for the model types llama, .*, got 'phi3'"),
    ("llama", {"hidden_act": "gelu"}, "the activation 'silu', the config has 'gelu'"),
    ("gemma3_text", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 16, the config has 64"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "by 'dynamic' are not"),
    ("llama", {"vocab_size": 200}, "has a token 300, the embedding only 200 rows"),
])  # fmt: skip
def test_a_setting_that_llama_cpp_has_not_needs_a_template(tmp_path, kind, settings, message):
    folder = write_folder(tmp_path / "tiny", kind, byte_level("gpt-2"), **settings)
    with pytest.raises(ValueError, match=f"{message}.*; give a template: "):
        written(folder)


@pytest.mark.parametrize("kind", CASES)
def test_llama_cpp_cuts_texts_and_computes_as_transformers(tmp_path, kind):
    llama_cpp = pytest.importorskip("llama_cpp")
    make, settings = CASES[kind]
    folder = write_folder(tmp_path / "tiny", kind, make(), **settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    path = str(written(folder).path)
    engine = llama_cpp.Llama(path, n_ctx=64, verbose=False, n_threads=1, logits_all=True)
    for text in [*TEXT, "the <think> cat", " hats", "a\n b"]:
        if kind == "mistral" and "<think>" in text:
            continue  # transformers drops the space after it
        assert engine.tokenize(text.encode(), special=True) == tokenizer(text)["input_ids"], text
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(TEXT[0], return_tensors="pt")["input_ids"][:, :24]
    engine.eval(ids[0].tolist())
    with torch.no_grad():
        expected = model(ids).logits[0]
    ours = torch.from_numpy(engine.scores[: ids.shape[1]])
    assert (ours - expected).abs().max() <= 0.01 * expected.abs().max()  # llama.cpp keeps keys and values in float16
