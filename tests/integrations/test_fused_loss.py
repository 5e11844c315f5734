"""`patch_loss` on tiny transformers models, and tied models: quantized, saved, loaded, trained by Trainer."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from helpers import assert_same_bits
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import qkernels as qk
from qkernels.integrations.lazy_logits import LazyLogits

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


def is_fused(output) -> bool:
    return isinstance(output.logits, LazyLogits) and output.logits.call.fused


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
        assert is_fused(fused)
        assert_same_bits(fused.logits, plain.logits)
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
    assert type(model.get_output_embeddings()) is (qk.QuantLinear if quantized else torch.nn.Linear)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_tuples_begin_with_the_loss(family):
    model = build(family)
    expected = model(**batch()).loss
    with qk.patch_loss(model):
        loss, logits, *_ = model(**batch(), return_dict=False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(logits, LazyLogits) and logits.call.fused


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
        assert is_fused(model(**batch()))
    assert type(model.lm_head) is torch.nn.Linear
    assert not is_fused(model(**batch()))


def test_a_copy_of_the_model_is_patched_too():
    model = build("llama")
    with qk.patch_loss(model, z_loss=0.1):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            expected = model(**batch()).loss
            other.model.norm.weight.data *= 2
            assert_same_bits(model(**batch()).loss, expected)
            other.model.norm.weight.data /= 2
            output = other(**batch())
            assert is_fused(output)
            assert_same_bits(output.loss, expected)
            head = other.lm_head
    assert type(head).__name__ == "_LazyLinear"  # the copy keeps its patch


def test_patching_leaves_no_trace():
    """Neither in buffers and random numbers, nor in the mode of parts that are not trained."""
    model = build("gpt2")
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    names = [set(vars(module)) for module in model.modules()]
    patch = qk.patch_loss(model)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    patch.remove()
    patch.remove()
    assert [set(vars(module)) for module in model.modules()] == names
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_patches_the_last_one_holds_and_either_may_go_first(order):
    model = build("llama")
    plain = model(**batch()).loss
    patches = [qk.patch_loss(model), qk.patch_loss(model, z_loss=0.1)]
    smoothed = model(**batch()).loss
    assert smoothed > plain
    with patches[1].disabled():
        torch.testing.assert_close(model(**batch()).loss, plain)
    patches[order[0]].remove()
    torch.testing.assert_close(model(**batch()).loss, (plain, smoothed)[1 - order[0]])
    patches[order[1]].remove()
    output = model(**batch())
    assert not is_fused(output) and type(output.logits) is torch.Tensor
    assert_same_bits(output.loss, plain)


def test_threads_do_not_see_each_other():
    """Two training threads, and one that switches the patch off for itself, on one model."""
    model = build("llama")
    qk.quantize_(model, "w8a8")
    batches = [{name: tensor.roll(i, 1) for name, tensor in batch().items()} for i in range(2)]
    expected = [model(**inputs).loss.detach() for inputs in batches]

    def run(i):
        for _ in range(20):
            with patch.disabled() if i == 2 else nullcontext():
                output = model(**batches[i % 2])
            assert is_fused(output) == (i < 2)
            torch.testing.assert_close(output.loss, expected[i % 2], rtol=1e-5, atol=1e-5)
            output.loss.backward()

    with qk.patch_loss(model) as patch, ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    assert model.eval()(**batch()).logits.shape == (2, 12, 200)


def test_a_replica_uses_its_own_head():
    """`nn.DataParallel` copies modules with their `__dict__`, hooks and all."""
    model = build("llama")
    with qk.patch_loss(model):
        replica, head = model._replicate_for_data_parallel(), model.lm_head._replicate_for_data_parallel()
        replica._modules["lm_head"] = head
        for name, parameter in model.lm_head._parameters.items():
            setattr(head, name, None if parameter is None else parameter * 2)
        output, expected = replica(**batch()), model(**batch())
    assert is_fused(output)
    torch.testing.assert_close(output.logits, 2 * expected.logits)
    assert (output.loss - expected.loss).abs() > 1e-4


@pytest.mark.parametrize(("first", "quantized"), [("patch", True), ("compile", False)])
def test_compiled_models(first, quantized):
    torch._dynamo.reset()
    model = build("llama")
    if quantized:
        qk.quantize_(model, "w8a8")
    plain, expected = loss_and_gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    if first == "compile":
        assert type(compiled(**batch()).logits) is torch.Tensor
    with qk.patch_loss(compiled):
        model.zero_grad()
        output = compiled(**batch())
        output.loss.backward()
        assert is_fused(output)
        torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.logits, plain.logits)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert (parameter.grad - expected[name]).norm() <= 0.03 * expected[name].norm() + 1e-7, name
    assert type(compiled(**batch()).logits) is torch.Tensor


def test_gradient_checkpointing():
    model = build("llama")
    _, expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable()
    with qk.patch_loss(model):
        output, grads = loss_and_gradients(model)
    assert is_fused(output)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


class OwnShift(LlamaForCausalLM):
    """As remote code does it."""

    def forward(self, input_ids=None, labels=None, **_):
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        loss = None if labels is None else cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class OwnLoss(LlamaForCausalLM):
    """No cross entropy: the log-probability of the last token."""

    def forward(self, input_ids=None, labels=None, **_):
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        loss = -logits.log_softmax(-1)[:, -1, labels[0, -1]].mean()
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_the_loss_is_what_the_model_computes():
    for change in (lambda loss, *_: 2 * loss, lambda loss, logits, labels: loss + logits.float().square().mean()):
        model = build("llama")

        def loss_function(logits, labels, change=change, **_):
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return change(loss, logits, labels)

        model.loss_function = loss_function
        plain, expected = loss_and_gradients(model)
        with qk.patch_loss(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the second one makes the logits
            output, grads = loss_and_gradients(model)
        assert is_fused(output)
        torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=1e-5)
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)
    own = OwnShift(LlamaConfig(**SPECIAL, **SIZES)).train()
    plain = own(**batch()).loss
    with qk.patch_loss(own):
        output = own(**batch())
    assert is_fused(output)
    torch.testing.assert_close(output.loss, plain, rtol=1e-5, atol=1e-5)


def test_a_loss_that_cannot_be_fused_is_told():
    model = OwnLoss(LlamaConfig(**SPECIAL, **SIZES)).train()
    plain, expected = loss_and_gradients(model)
    with qk.patch_loss(model), pytest.warns(UserWarning, match="patch_loss has no effect on OwnLoss"):
        output, grads = loss_and_gradients(model)
    assert_same_bits(output.loss, plain.loss)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad)
    with qk.patch_loss(model, z_loss=0.1), pytest.raises(ValueError, match="label_smoothing and z_loss would be miss"):
        model(**batch())
    model = build("llama")
    with qk.patch_loss(model):
        model.lm_head = torch.nn.Linear(48, 200)
        with pytest.warns(UserWarning, match="its head was replaced"):
            model(**batch())


def test_own_training_loops_are_fused():
    model = build("llama")
    inputs = batch()
    labels = inputs.pop("labels")[:, 1:].flatten()
    expected = cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), labels)
    with qk.patch_loss(model):
        logits = model(**inputs).logits
        torch.testing.assert_close(cross_entropy(logits[:, :-1].flatten(0, 1), labels), expected)
    assert logits.call.fused


def test_models_without_a_head_that_fits_are_refused():
    llama = build("llama")
    qk.quantize_(llama, "w8a8", "qat")
    cases = [
        (llama, "head must be frozen or in float, got a QuantLinear in mode 'qat'"),
        (torch.nn.Linear(3, 3), "as its head, got Linear with NoneType"),
        (LlamaForSequenceClassification(LlamaConfig(**SPECIAL, **SIZES)), "as its head, got LlamaForSeq"),
        (build("llama").model, "as its head, got LlamaModel with NoneType"),
    ]
    for model, message in cases:
        before = [set(vars(module)) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            qk.patch_loss(model)
        assert [set(vars(module)) for module in model.modules()] == before
    gemma = build("gemma2")
    qk.quantize_(gemma, "w8a8", embeddings=True)
    with pytest.raises(ValueError, match="label_smoothing must be 0 for a quantized head with soft-capped logits"):
        qk.patch_loss(gemma, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 2"):
        qk.patch_loss(gemma, label_smoothing=2)


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
        qk.quantize_(model, "w8a8", "frozen" if mode == "lora" else "qat", grad_dtype="int8", embeddings=mode == "lora")
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
