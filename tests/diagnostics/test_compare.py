"""`compare` against the definitions, written out once more; which layers it sees; what it refuses."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.diagnostics import compare as comparing
from qkernels.diagnostics.compare_plot import save_plot

transformers = pytest.importorskip("transformers")


def llama(**options) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def quantized(model: nn.Module, scheme: str = "w4a8-g32") -> nn.Module:
    twin = copy.deepcopy(model)
    qk.quantize_(twin, scheme)
    return twin


@pytest.fixture(scope="module")
def blocks():
    return [torch.randint(120, (count,), generator=torch.Generator().manual_seed(count)) for count in (23, 40, 2)]


def by_definition(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of the probabilities of both, and KL(a || b) of each row of logits."""
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a.astype(np.float64), b.astype(np.float64))]
    return *logs, (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)


@pytest.mark.parametrize("chunk", [1 << 18, 500, 1])
def test_numbers_of_a_causal_model_are_their_definitions(blocks, chunk, monkeypatch):
    monkeypatch.setattr(comparing, "_CHUNK", chunk)
    a, b = llama(), quantized(llama())
    found = qk.compare(a, b, blocks)
    with torch.no_grad():
        of_a, of_b = ([m(input_ids=x[None]).logits[0].numpy() for x in blocks] for m in (a, b))
    logs_a, logs_b, kl = by_definition(*(np.concatenate([x[:-1] for x in of]) for of in (of_a, of_b)))
    targets = np.concatenate([x[1:].numpy() for x in blocks])
    assert len(found.kl) == len(kl) == 22 + 39 + 1
    np.testing.assert_allclose(found.kl, kl, rtol=1e-9, atol=1e-12)
    assert found.agreement == (logs_a.argmax(-1) == logs_b.argmax(-1)).mean()
    for losses, logs, perplexity in (
        (found.loss_a, logs_a, found.perplexity_a),
        (found.loss_b, logs_b, found.perplexity_b),
    ):
        expected = -np.take_along_axis(logs, targets[:, None], -1)[:, 0]
        np.testing.assert_allclose(losses, expected, rtol=1e-12)
        assert perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-12)
        error = np.exp(expected.mean()) * expected.std(ddof=1) / math.sqrt(len(expected))
        assert comparing._perplexity_error(losses) == pytest.approx(error, rel=1e-9)
    x, y = (np.concatenate([part[:-1].ravel() for part in of]).astype(np.float64) for of in (of_a, of_b))
    assert found.output_error == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-9)
    assert 0 < found.kl.mean() and found.agreement < 1  # else nothing was compared


def test_a_model_is_as_it_is(blocks):
    model = llama()
    found = qk.compare(model, copy.deepcopy(model), blocks)
    assert not found.kl.any() and found.agreement == 1 and found.output_error == 0
    assert len(found.layers) == 2 * 7 + 2 and {row.error for row in found.layers} == {0.0}
    assert qk.compare(model, model, blocks).to_dict() == found.to_dict()
    again = qk.compare(model, quantized(model), blocks)
    assert again.to_dict() == qk.compare(model, quantized(model), blocks).to_dict()


def test_the_error_of_a_layer_is_its_own(blocks):
    a = llama()
    b = copy.deepcopy(a)
    layer = b.model.layers[0].mlp.up_proj
    layer.weight.data *= 1.25
    errors = {row.name: row.error for row in qk.compare(a, b, blocks).layers}
    assert errors.pop("model.layers.0.mlp.up_proj") == pytest.approx(0.25, rel=1e-6)
    assert set(errors.values()) == {0.0}  # although their inputs in b differ


def test_the_error_of_a_quantized_layer(blocks):
    a, seen = llama(), []
    b = quantized(a)
    handle = a.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    found = qk.compare(a, b, blocks)
    handle.remove()
    change = sum(float((b.model.layers[1].mlp.down_proj(x) - y).double().square().sum()) for x, y in seen)
    size = sum(float(y.double().square().sum()) for _, y in seen)
    row = next(row for row in found.layers if row.name == "model.layers.1.mlp.down_proj")
    assert row.error == pytest.approx(math.sqrt(change / size), rel=1e-6)
    assert row.kinds == ("float32", "w4a8-g32")
    assert not found.unmatched


def test_models_are_left_as_they_were(blocks):
    a, b = llama().train(), quantized(llama())
    b.model.layers[1].train()
    training = [[m.training for m in model.modules()] for model in (a, b)]
    qk.compare(a, b, blocks)
    with pytest.raises(TypeError, match=r"inputs\[1\]"):
        qk.compare(a, b, [blocks[0], None])
    assert [[m.training for m in model.modules()] for model in (a, b)] == training
    assert not any(m._forward_hooks for model in (a, b) for m in model.modules())


def test_models_of_another_dtype(blocks):
    a = llama()
    found = qk.compare(a, copy.deepcopy(a).to(torch.bfloat16), blocks)
    assert 0 < found.output_error < 0.05 and all(0 <= row.error < 0.01 for row in found.layers)
    assert found.layers[0].kinds == ("float32", "bfloat16")


def test_a_masked_entry_of_the_vocabulary_counts_as_nothing(blocks):
    class Masked(nn.Module):
        def __init__(self, shift: float, masked: bool = True) -> None:
            super().__init__()
            self.table, self.masked = nn.Embedding(120, 120), masked
            nn.init.orthogonal_(self.table.weight)
            self.table.weight.data[:, 5] += shift

        def forward(self, ids):
            logits = self.table(ids)
            return logits.index_fill(-1, torch.tensor([7]), -torch.inf) if self.masked else logits

    torch.manual_seed(0)
    a = Masked(0)
    b = copy.deepcopy(a)
    b.table.weight.data[:, 5] += 1
    found = qk.compare(a, b, blocks, causal=True)
    keep = torch.arange(120) != 7
    with torch.no_grad():
        of_a, of_b = (torch.cat([m.table(x)[:-1, keep] for x in blocks]).numpy() for m in (a, b))
    np.testing.assert_allclose(found.kl, by_definition(of_a, of_b)[2], rtol=1e-9)
    assert math.isfinite(found.output_error)
    unmasked = copy.deepcopy(a)
    unmasked.masked = False
    assert qk.compare(unmasked, a, blocks, causal=True).kl.isinf().all()  # a expects what b excludes
    assert qk.compare(unmasked, a, blocks, causal=True).to_dict()["kl"]["mean"] is None


class TestOtherModels:
    CONFIG = {
        "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "initializer_range": 0.3,
    }  # fmt: skip

    def pair(self, kind: str, **options) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        model = getattr(transformers, kind)(transformers.BertConfig(**self.CONFIG, **options)).eval()
        return model, quantized(model)

    def batch(self) -> dict[str, torch.Tensor]:
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[1, 5:] = 0
        return {"input_ids": torch.randint(120, (2, 9)), "attention_mask": mask}

    def test_masked_language_model_leaves_padding_out(self):
        a, b = self.pair("BertForMaskedLM")
        batch = self.batch()
        found = qk.compare(a, b, [batch])
        with torch.no_grad():
            of_a, of_b = (m(**batch).logits[batch["attention_mask"] == 1].numpy() for m in (a, b))
        np.testing.assert_allclose(found.kl, by_definition(of_a, of_b)[2], rtol=1e-9)
        assert len(found.kl) == 14 and found.perplexity_a is None and "perplexity" not in str(found)

    def test_classifier(self):
        a, b = self.pair("BertForSequenceClassification", num_labels=3)
        found = qk.compare(a, b, [self.batch(), self.batch()])
        assert len(found.kl) == 4 and found.kl.mean() > 0 and found.output_error > 0
        assert {row.kinds[1] for row in found.layers} == {"w4a8-g32", "float32"}

    def test_regression_has_an_output_error_alone(self):
        a, b = self.pair("BertForSequenceClassification", num_labels=1)
        found = qk.compare(a, b, [self.batch()])
        assert len(found.kl) == 0 and 0 < found.output_error < 1
        assert found.to_dict()["kl"] is None and "output error" in str(found)
        json.dumps(found.to_dict(), allow_nan=False)

    def test_a_model_without_a_head(self):
        a, b = self.pair("BertModel")
        batch = self.batch()
        found = qk.compare(a, b, [batch])
        with torch.no_grad():
            x, y = (m(**batch).last_hidden_state[batch["attention_mask"] == 1].double() for m in (a, b))
        assert len(found.kl) == 0 and found.output_error == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-9)
        with pytest.raises(ValueError, match="causal model must give logits"):
            qk.compare(a, b, [batch], causal=True)

    def test_encoder_and_decoder(self):
        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=120, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        a = transformers.T5ForConditionalGeneration(config).eval()
        inputs = [{"input_ids": torch.randint(120, (1, 9)), "decoder_input_ids": torch.randint(120, (1, 6))}]
        found = qk.compare(a, quantized(a), inputs)
        assert len(found.kl) == 6 and found.perplexity_a is None

    def test_layers_of_several_weights_and_convolutions(self):
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv1d(8, 64, 3, padding=1)
                self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
                self.out = nn.Linear(64, 5)
                self.unused = nn.Linear(64, 5)

            def forward(self, input):
                x = self.conv(input).transpose(1, 2)
                return self.out(self.attention(x, x, x, need_weights=False)[0])

        a = Model().eval()
        found = qk.compare(a, quantized(a), [torch.randn(2, 8, 11)])
        assert [row.name for row in found.layers] == ["conv", "attention", "out"]
        assert all(0 < row.error < 0.5 for row in found.layers)
        assert found.unmatched == {"unused": "did not run"}

    def test_experts(self):
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, initializer_range=0.3,
        )  # fmt: skip
        a = transformers.MixtralForCausalLM(config).eval()
        found = qk.compare(a, quantized(a, "w8a8"), [torch.arange(40)])
        (row,) = [row for row in found.layers if row.name.endswith(".experts")]
        assert 0 < row.error < 0.05 and row.kinds == ("float32", "w8a8")


class TestAdapters:
    def adapted(self, scale: float, base: nn.Module | None = None) -> nn.Module:
        peft = pytest.importorskip("peft")
        base = llama() if base is None else base
        config = peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        model = peft.get_peft_model(base, config).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= scale
        return model

    def merged(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).merge_and_unload()

    def test_names_are_those_without_the_adapter(self, blocks):
        adapted = self.adapted(1)
        found = qk.compare(adapted, self.merged(adapted), blocks)
        assert {row.name for row in found.layers} == {row.name for row in qk.compare(llama(), llama(), blocks).layers}
        assert not found.unmatched and all(row.error < 1e-5 for row in found.layers)
        (row,) = [row for row in found.layers if row.name == "model.layers.0.mlp.up_proj"]
        assert row.kinds == ("float32 + adapter", "float32")

    def test_a_merge_that_keeps_the_adapter_and_one_that_destroys_it(self, blocks):
        on_grid = llama()
        qk.quantize_(on_grid, "w4a16")
        in_float = copy.deepcopy(on_grid)
        qk.dequantize_(in_float)
        exact = self.adapted(0.02, in_float).merge_and_unload()
        adapted = self.adapted(0.02, on_grid)
        found = qk.compare_merge(adapted, exact, blocks, layers=True)
        assert found.kept == pytest.approx(1, abs=1e-3) and found.kept_error < 1e-3 and found.merged.layers
        assert "of the change" in str(found)
        rounded = copy.deepcopy(exact)
        qk.quantize_(rounded, "w4a16")  # to the integers of the base: the adapter is less than half a step
        lost = qk.compare_merge(adapted, rounded, blocks)
        assert abs(lost.kept) < 0.1 and "LOSES" in str(lost)
        assert lost.base.to_dict() == found.base.to_dict()
        json.dumps(lost.to_dict(), allow_nan=False)

    def test_the_share_that_is_kept_is_its_definition(self, blocks):
        adapted = self.adapted(0.3)
        merged = quantized(self.merged(adapted), "w8a8")
        found = qk.compare_merge(adapted, merged, blocks)
        with torch.no_grad():
            of = [torch.cat([m(input_ids=x[None]).logits[0, :-1] for x in blocks]).double() for m in (adapted, merged)]
            with adapted.disable_adapter():
                base = torch.cat([adapted(input_ids=x[None]).logits[0, :-1] for x in blocks]).double()
        p = of[0].softmax(-1)
        change, after = (x - base - (p * (x - base)).sum(-1, keepdim=True) for x in of)
        products, squares = (p * change * after).sum(-1), (p * change * change).sum(-1)
        assert found.kept == pytest.approx(float(products.sum() / squares.sum()), rel=1e-9)
        assert 0.8 < found.kept < 1.2 and 0 < found.kept_error < 0.1
        against_base = qk.compare(adapted, llama(), blocks, layers=False)
        assert torch.allclose(found.base.kl, against_base.kl, rtol=1e-6, atol=1e-12)

    def test_an_adapter_that_changes_nothing(self, blocks):
        adapted = self.adapted(0)
        found = qk.compare_merge(adapted, self.merged(adapted), blocks)
        assert math.isnan(found.kept) and "changes nothing" in str(found)

    def test_needs_an_adapter(self, blocks):
        with pytest.raises(TypeError, match="PEFT model"):
            qk.compare_merge(llama(), llama(), blocks)


class TestRefused:
    def test_other_vocabulary(self, blocks):
        other = llama()
        other.resize_token_embeddings(128)
        with pytest.raises(ValueError, match=r"vocabularies differ.*120.*128"):
            qk.compare(llama(), other, blocks, layers=False)

    def test_layers_of_other_shapes_are_named(self, blocks):
        torch.manual_seed(0)
        config = copy.deepcopy(llama().config)
        config.intermediate_size = 96
        with pytest.raises(ValueError, match=r"layer model.layers.0.mlp.* in a, \[.*\] in b"):
            qk.compare(llama(), transformers.LlamaForCausalLM(config), blocks)

    @pytest.mark.parametrize(
        ("inputs", "error", "words"),
        [
            ([], ValueError, "at least one input"),
            (torch.arange(5), TypeError, r"pass \[input\]"),
            ("some text", TypeError, "str"),
            (["some text"], TypeError, r"inputs\[0\].*tokenize"),
            ([torch.arange(1)], ValueError, "at least 2 tokens"),
            ([torch.arange(0)], ValueError, r"\[0\]"),
            ([torch.zeros(1, 2, 3, dtype=torch.int64)], ValueError, r"\[1, 2, 3\]"),
        ],
    )
    def test_inputs(self, inputs, error, words):
        with pytest.raises(error, match=words):
            qk.compare(llama(), llama(), inputs)

    def test_outputs_that_are_not_numbers(self, blocks):
        broken = llama()
        broken.model.norm.weight.data[3] = math.nan
        with pytest.raises(ValueError, match=r"outputs of b .*NaN"):
            qk.compare(llama(), broken, blocks)

    def test_a_model_without_outputs(self):
        class Nothing(nn.Module):
            def forward(self, input):
                return None

        with pytest.raises(TypeError, match="NoneType"):
            qk.compare(Nothing(), Nothing(), [torch.randn(2, 3)])


def test_picture(blocks, tmp_path):
    pytest.importorskip("matplotlib")
    a, b = llama(), quantized(llama())
    exact, lost = qk.compare(a, a, blocks), qk.compare(a, b, blocks)
    save_plot(lost, tmp_path / "lost.png", "A, B")
    save_plot(exact, tmp_path / "exact.png")
    save_plot(qk.compare(a, b, blocks, layers=False), tmp_path / "tokens.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("lost", "exact", "tokens"))
    model = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="has neither"):
        save_plot(qk.compare(model, model, [torch.randn(3, 4)], layers=False), tmp_path / "none.png")
