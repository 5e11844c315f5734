"""What `patch_loss` does to language models of transformers, from small random configurations.

`python tests/support/loss_families.py [CLASS ...]` tries every class that transformers lists for causal, masked and
sequence-to-sequence language modelling, and prints the counts of docs/loss.md with the names behind them.
"""

import signal
import sys
import warnings
from collections import defaultdict

import torch
import transformers
from transformers.models.auto import modeling_auto

import qkernels as qk

# Whichever of these a configuration has.
SIZES = dict(
    vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    intermediate_size=48, head_dim=16, max_position_embeddings=64, n_embd=32, n_layer=2, n_head=2, n_positions=64,
    n_ctx=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=2, encoder_layers=2,
    decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
    ffn_dim=48, embedding_size=32, word_embed_proj_dim=32, dim=32, hidden_dim=48, n_heads=2, n_layers=2,
    rotary_dim=8, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, num_mel_bins=16, max_source_positions=20,
    max_target_positions=64, emb_dim=32, n_inner=48, expert_interval=1, state_size=8, time_step_rank=8,
    pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=2, cls_token_id=1, sep_token_id=2, mask_token_id=3,
)  # fmt: skip
LISTS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence to sequence": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}


def build(name: str) -> transformers.PreTrainedModel:
    """A small model of this class without dropout, with random weights."""
    cls = getattr(transformers, name)
    default = cls.config_class()
    known = {**default.to_dict(), **default.attribute_map}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    if default.is_encoder_decoder:
        sizes["decoder_start_token_id"] = 1
    rates = {key: 0.0 for key, value in default.to_dict().items() if "drop" in key and isinstance(value, float)}
    torch.manual_seed(0)
    return cls(cls.config_class(**sizes, **rates)).float().train()


def inputs_of(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(
        5, model.config.get_text_config().vocab_size, (2, 12), generator=torch.Generator().manual_seed(1)
    )
    inputs = {"labels": ids.masked_fill(ids % 5 == 0, -100)}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, model.config.num_mel_bins, 40), "labels": ids}
    return {"input_ids": ids, **inputs}


def step(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradients of a training step."""
    torch.manual_seed(2)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def outcome(name: str) -> str:
    """'fused', or why not; an AssertionError if the patched step is not the model's own."""
    try:
        model = build(name)
        inputs = inputs_of(model)
        loss, grad = step(model, inputs)
        again = step(model, inputs)
    except Exception as error:
        return f"not tried: {type(error).__name__}"
    if not (torch.equal(again[0], loss) and grad.isfinite().all()):
        return "not tried: random or not finite"
    try:
        patch = qk.patch_loss(model)
    except ValueError as error:
        return f"refused: {error}"
    with patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patched = step(model, inputs)
    torch.testing.assert_close(patched[0], loss, rtol=1e-4, atol=1e-5)
    assert (patched[1] - grad).norm() <= 1e-3 * grad.norm(), name
    ours = [str(warning.message) for warning in caught if "patch_loss" in str(warning.message)]
    return "fused" if not ours else "told: " + ("no effect" if "no effect" in ours[0] else "logits made")


def _alarm(*_: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _alarm)
    chosen = {"chosen": dict.fromkeys(sys.argv[1:], None)} if sys.argv[1:] else LISTS
    seen: set[str] = set()
    for kind, mapping in chosen.items():
        results = defaultdict(list)
        names = [n for value in mapping.values() for n in (value if isinstance(value, tuple | list) else [value])]
        for name in names if mapping is not chosen.get("chosen") else mapping:
            if name in seen:
                continue
            seen.add(name)
            signal.alarm(60)
            try:
                result = outcome(name)
            except TimeoutError:
                result = "not tried: slow"
            except Exception as error:
                result = f"WRONG {type(error).__name__}: {str(error)[:200]}"
            signal.alarm(0)
            results[result].append(name)
            print(f"{name}: {result}", file=sys.stderr, flush=True)
        for result, members in sorted(results.items(), key=lambda item: -len(item[1])):
            print(f"{kind} | {result} | {len(members)} | {', '.join(members)}", flush=True)
