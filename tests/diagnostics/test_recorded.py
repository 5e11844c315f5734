"""`record_outputs`: what is read back is what the model gave, for the same inputs and no others."""

import copy

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.diagnostics.recorded import RecordedModel, record_outputs

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_comparison_with_recorded_outputs_has_the_same_bits(tmp_path, dtype):
    config = transformers.LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    a = transformers.LlamaForCausalLM(config).to(dtype).train()
    b = copy.deepcopy(a)
    qk.quantize_(b, "w4a8-g32")
    inputs = [torch.arange(9), {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12)}]
    record_outputs(a, inputs, tmp_path / "outputs")
    assert a.training and not list((tmp_path / "outputs").glob("*.partial"))
    again = RecordedModel(tmp_path / "outputs")  # as in another process
    found = qk.compare(again, b, inputs, layers=False)
    assert found.to_dict() == qk.compare(a, b, inputs, layers=False).to_dict()
    assert found.perplexity_a is not None and found.kl.mean() > 0
    with pytest.raises(ValueError, match="no outputs for these inputs"):
        qk.compare(again, b, [torch.arange(10)], layers=False)


def test_a_model_without_logits(tmp_path):
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 1)

        def forward(self, input):
            return self.out(input)

    a, b, inputs = Plain(), Plain(), [torch.randn(3, 8)]
    found = qk.compare(record_outputs(a, inputs, tmp_path), b, inputs, layers=False)
    assert found.to_dict() == qk.compare(a, b, inputs, layers=False).to_dict() and len(found.kl) == 0


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recorded outputs"):
        RecordedModel(tmp_path)
