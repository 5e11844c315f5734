"""`patch_loss` on tiny transformers models, and tied models: quantized, saved, loaded, trained by Trainer."""

import copy

import peft
import pytest
import torch
import transformers
from helpers import assert_same_bits
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import qkernels as qk

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SPECIAL = dict(vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80, head_dim=12
)
BERT = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**SPECIAL, n_layer=2, n_embd=48, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SPECIAL, **SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SPECIAL, **SIZES, final_logit_softcapping=2.0)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SPECIAL, **SIZES)),
    # Masked: one computes its loss itself, the other calls `loss_function`.
    "bert": lambda: BertForMaskedLM(
        BertConfig(**SPECIAL, **BERT, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    ),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SPECIAL, **BERT, cls_token_id=1, sep_token_id=2, attn_implementation="eager")
    ),
}
TIED = ("gpt2", "gemma2", "gemma3")


def build(family: str):
    torch.manual_seed(0)
    return FAMILIES[family]().train()


def batch() -> dict:
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100)}


def loss_and_gradients(model, **extra):
    model.zero_grad()
    out = model(**batch(), **extra)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
def test_training_loss_and_gradients(family, quantized, items):
    model = build(family)
    if quantized:
        qk.quantize_(model, "w8a8", embeddings=True)
    extra = {} if items is None else {"num_items_in_batch": items}
    plain, expected = loss_and_gradients(model, **extra)
    with qk.patch_loss(model) as patch:
        fused, grads = loss_and_gradients(model, **extra)
        with patch.disabled():
            assert model(**batch()).logits.shape == (2, 12, 200)
        assert fused.logits.shape == (2, 12, 0)
        torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-5)
        assert grads.keys() == expected.keys()
        grad, exact = (torch.cat([tensor.flatten() for tensor in g.values()]) for g in (grads, expected))
        assert (grad - exact).norm() < (0.02 if quantized else 1e-5) * exact.norm()
        with torch.no_grad():
            assert model(**batch()).logits.shape == (2, 12, 200)
        evaluated = model.eval()(**batch(), **extra)
        assert_same_bits(evaluated.logits, model(input_ids=batch()["input_ids"]).logits)
        torch.testing.assert_close(evaluated.loss, plain.loss)
        model.train()
    assert_same_bits(loss_and_gradients(model, **extra)[0].logits, plain.logits)
    assert "forward" not in vars(model.get_output_embeddings()) and "_loss_function" not in vars(model)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_tuples_begin_with_the_loss(family):
    model = build(family)
    expected = model(**batch()).loss
    with qk.patch_loss(model):
        loss, logits, *_ = model(**batch(), return_dict=False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert logits.shape == (2, 12, 0)


def test_terms_of_the_loss_are_passed_on():
    model = build("llama")
    hidden, labels = model.model(input_ids=batch()["input_ids"]).last_hidden_state, batch()["labels"]
    with qk.patch_loss(model, label_smoothing=0.1, z_loss=0.01):
        loss = model(**batch()).loss
    terms = {"label_smoothing": 0.1, "z_loss": 0.01}
    expected = qk.linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, labels[:, 1:], **terms)
    torch.testing.assert_close(loss, expected)


def test_a_failing_forward_leaves_the_model_as_it_was():
    model = build("llama")
    with qk.patch_loss(model):
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 3), 999), labels=torch.zeros(1, 3, dtype=torch.int64))
        assert "forward" not in vars(model.lm_head)


def test_a_copy_of_the_model_has_a_patch_of_its_own():
    model = build("llama")
    with qk.patch_loss(model):
        other = copy.deepcopy(model)
        expected = model(**batch()).loss
        model.lm_head.weight.data.zero_()
        assert_same_bits(other(**batch()).loss, expected)


def test_models_that_change_their_logits_are_refused():
    with pytest.raises(ValueError, match="CohereForCausalLM has scaled or changed logits"):
        qk.patch_loss(CohereForCausalLM(CohereConfig(**SPECIAL, **SIZES)))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match="must be a causal or masked language model, but with two tokens T5ForCond"):
        qk.patch_loss(t5)
    llama = build("llama")
    llama.loss_function = lambda logits, labels, **_: 2 * torch.nn.functional.cross_entropy(logits[0], labels[0])
    with pytest.raises(ValueError, match="LlamaForCausalLM has a loss of its own"):
        qk.patch_loss(llama)
    qk.quantize_(llama, "w8a8", "qat")
    with pytest.raises(ValueError, match="head must be frozen or in float, got a QuantLinear in mode 'qat'"):
        qk.patch_loss(llama)
    with pytest.raises(TypeError, match="head, got NoneType"):
        qk.patch_loss(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize(("scheme", "embeddings"), [("w8a8", True), ("w4a8-g32-asym", True), ("w4a8-g32-asym", "w8a8")])
def test_tied_model_round_trip(family, scheme, embeddings, tmp_path):
    """quantize_ == from_pretrained of the float folder == from_pretrained of the quantized folder, with one storage."""
    model = build(family).eval()
    model.save_pretrained(tmp_path / "float")
    report = qk.quantize_(model, scheme, strict=True, embeddings=embeddings)
    model.save_pretrained(tmp_path / "quantized")
    config = qk.QKernelsConfig(scheme, embeddings=embeddings)
    from_float = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert from_float.quantization_report.to_dict() == report.to_dict()
    from_float.save_pretrained(tmp_path / "again")
    expected = model(input_ids=batch()["input_ids"]).logits
    for other in (from_float, *map(AutoModelForCausalLM.from_pretrained, (tmp_path / "quantized", tmp_path / "again"))):
        embedding, head = other.get_input_embeddings(), other.get_output_embeddings()
        assert isinstance(embedding, qk.QuantEmbedding) and isinstance(head, qk.QuantLinear)
        other.tie_weights()
        assert head.qweight is embedding.qweight and head.scales is embedding.scales
        assert head.scheme == embedding.scheme == qk.QuantScheme.parse(scheme if embeddings is True else embeddings)
        assert sum(isinstance(m, qk.QuantLinear) and m.scheme.name == scheme for m in other.modules()) >= 8
        assert_same_bits(other.eval()(input_ids=batch()["input_ids"]).logits, expected)
    with safe_open(tmp_path / "quantized" / "model.safetensors", "pt") as file:
        assert [key for key in file.keys() if key.endswith(("wte.qweight", "embed_tokens.qweight", "lm_head.qweight"))]
        assert len([key for key in file.keys() if key.startswith("lm_head")]) == 0


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym", "w4a16-g32"])
def test_encoder_decoder_round_trip(scheme, tmp_path):
    """T5: two embeddings and a head on one storage, and embeddings of relative positions."""
    sizes = dict(vocab_size=96, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    qk.quantize_(model, scheme, strict=True, embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    ids = batch()["input_ids"] % 96
    with torch.no_grad():
        expected, logits = (m(input_ids=ids, decoder_input_ids=ids % 7).logits for m in (model, loaded))
    assert loaded.lm_head.qweight is loaded.shared.qweight
    assert_same_bits(logits, expected)


@pytest.mark.parametrize("mode", ["lora", "qat"])
def test_trainer_runs_are_bit_identical(mode, tmp_path):
    """Same seed, data and thread count: losses and weights, with dropout, int8 gradients and the fused loss."""

    def run(seed: int):
        transformers.set_seed(seed)
        config = GPT2Config(**SPECIAL, n_layer=2, n_embd=48, n_head=4, n_positions=64)
        model = GPT2LMHeadModel(config)
        qk.quantize_(model, "w8a8", "frozen" if mode == "lora" else "qat", grad="int8", embeddings=mode == "lora")
        if mode == "lora":
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"]))
        rows = [{name: tensor[i] for name, tensor in batch().items()} for i in range(2)] * 4
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=2, max_steps=6, logging_steps=1, report_to=[], use_cpu=True,
            seed=seed, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        with qk.patch_loss(model):
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    (losses, state), (losses_again, state_again), (other, _) = run(1), run(1), run(2)
    assert len(losses) == 6 and losses == losses_again != other
    for name, tensor in state.items():
        assert_same_bits(state_again[name], tensor, name)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_trainer_with_lora_over_a_tied_quantized_model(family, tmp_path):
    model = build(family)
    qk.quantize_(model, "w8a8", embeddings=True)
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = [{name: tensor[i] for name, tensor in batch().items()} for i in range(2)] * 4
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    with qk.patch_loss(model):
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        first = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < first
    assert all((dict(model.named_parameters())[name] != p).any() for name, p in before.items())
