"""Every method of PEFT over a float base and a quantized one: what it does at each step of a user's work.

`run` takes one row and one base, and says of each step whether it held; `benchmarks/peft_methods.py` writes the rows
of a table.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import qkernels as qk
from qkernels.integrations.peft import initialization_errors, merge_errors
from qkernels.nn.storage import Storage

STEPS = 3
IDS = torch.arange(3, 19).reshape(2, 8)
# The invocation tokens of aLoRA stand before the end, so that tokens follow that see the adapter.
INVOCATION = [5, 6]
BASES = {
    "float": dict(scheme=None),
    "w8a8": dict(scheme="w8a8"),
    "w4a8-g32": dict(scheme="w4a8-g32"),
    "qat": dict(scheme="w8a8", mode="qat"),
    "int8": dict(scheme="w8a8", mode="int8"),
}
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
MLP = {"target_modules": ["q_proj", "v_proj"]}


def llama(tie: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    config = transformers.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tie)
    model = transformers.LlamaForCausalLM(config).eval()
    # Weights of the size that trained ones have: those of a new model change the logits by a few percent only.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.15)
    return model.to(dtype)


@dataclass
class Row:
    """One configuration of PEFT.

    Attributes:
        config: makes it anew, because PEFT writes into configurations.
        prepare: what PEFT wants done to the model first.
        learning_rate: of Adam.
        changes_base: it stores another base weight when it is created, so that switching it off is not the base.
        merges: it can be merged into a float base.
        copies: a float model with it can be copied and pickled.
        embeddings: the embeddings are quantized too.
        inputs: what a call takes besides the tokens.
        refused: a pattern of the refusal over a quantized base, of a method that cannot work there.
        needs: a library that PEFT imports for it, and does not require.
    """

    name: str
    config: Callable[[], Any]
    prepare: Callable[[nn.Module, Any], None] | None = None
    learning_rate: float = 0.01
    changes_base: bool = False
    merges: bool = True
    copies: bool = True
    embeddings: bool = False
    inputs: Callable[[], dict[str, Any]] = dict
    refused: str = ""
    needs: str | None = None


def lora(**options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **TARGETS, **options})


def method(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, f"{name}Config")(**{"task_type": "CAUSAL_LM", **TARGETS, **options})


def prompt(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, f"{name}Config")(task_type="CAUSAL_LM", **options)


def corda(model: nn.Module, config: Any) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    def feed() -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _ in range(4):
                model(input_ids=torch.randint(0, 64, (1, 64), generator=generator))

    preprocess_corda(model, config, run_model=feed)


def lora_ga(model: nn.Module, config: Any) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())


ROWS = [
    Row("LoRA", lora()),
    Row("LoRA, bias", lora(lora_bias=True), merges=False),
    Row("LoRA, all layers", lora(target_modules="all-linear")),
    Row("LoRA, rank_pattern", lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 16})),
    Row("LoRA, gaussian", lora(init_lora_weights="gaussian")),
    Row("LoRA, layer_replication", lora(layer_replication=[[0, 1], [0, 1]]), changes_base=True, merges=False),
    Row("LoRA, modules_to_save of the head", lora(modules_to_save=["lm_head"])),
    Row("LoRA, modules_to_save of a layer", lora(modules_to_save=["o_proj"])),
    Row("LoRA, target_parameters", lora(target_modules=[], target_parameters=["q_proj.weight"])),
    Row("LoRA of an embedding", lora(target_modules=["embed_tokens"]), embeddings=True),
    Row("LoRA, trainable_token_indices", lora(trainable_token_indices=[3, 5]), embeddings=True),
    Row("rsLoRA", lora(use_rslora=True)),
    Row("DoRA", lora(use_dora=True)),
    Row("PiSSA", lora(init_lora_weights="pissa"), changes_base=True),
    Row("PiSSA, niter", lora(init_lora_weights="pissa_niter_4"), changes_base=True),
    Row("OLoRA", lora(init_lora_weights="olora"), changes_base=True),
    Row("orthogonal", lora(init_lora_weights="orthogonal")),
    Row(
        "LoftQ",
        lora(init_lora_weights="loftq", loftq_config={"loftq_bits": 8, "loftq_iter": 1}),
        changes_base=True,
        refused="^ValueError: init_lora_weights='loftq' needs the float weight",
    ),
    Row("EVA", lora(init_lora_weights="eva", eva_config=peft.EvaConfig())),
    Row(
        "CorDA",
        lora(init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method="kpm")),
        prepare=corda,
        changes_base=True,
        needs="attr",
    ),
    Row(
        "LoRA-GA",
        lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()),
        prepare=lora_ga,
        changes_base=True,
    ),
    Row("MiCA", lora(init_lora_weights="mica")),
    Row("KaSA", lora(kasa_config=peft.tuners.lora.config.KasaConfig()), changes_base=True),
    Row("VeLoRA", lora(velora_config=peft.tuners.lora.config.VeloraConfig(num_groups=4))),
    Row("MonteCLoRA", lora(monteclora_config=peft.tuners.lora.config.MontecloraConfig()), copies=False),
    Row("aLoRA", lora(alora_invocation_tokens=INVOCATION), merges=False),
    Row(
        "BD-LoRA",
        lora(
            use_bdlora=peft.tuners.lora.config.BdLoraConfig(
                target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj", "down_proj"], nblocks=2
            )
        ),
    ),
    Row("QALoRA", lora(use_qalora=True, qalora_group_size=8), refused="^ValueError: use_qalora works on GPTQ layers"),
    Row("AdaLoRA", method("AdaLora", total_step=9, tinit=1, tfinal=1)),
    Row("IA3", method("IA3", feedforward_modules=["down_proj"])),
    Row("LoHa", method("LoHa", r=4)),
    Row("LoKr", method("LoKr", r=4)),
    Row("OFT", method("OFT", oft_block_size=8, r=0)),
    Row("BOFT", method("BOFT", boft_block_size=8)),
    Row("VeRA", method("Vera", r=8), learning_rate=0.1),
    Row("PVeRA", method("Pvera", r=8), learning_rate=0.1),
    Row("RandLora", method("RandLora", r=4)),
    Row("VBLoRA", method("VBLoRA", num_vectors=8, vector_length=16, topk=2), learning_rate=0.1),
    Row("UniLoRA", method("UniLora"), learning_rate=0.1),
    Row("FourierFT", method("FourierFT", n_frequency=16), learning_rate=0.1),
    Row("WaveFT", method("WaveFT", n_frequency=16), learning_rate=0.1),
    Row("HRA", method("HRA", r=4)),
    Row("HiRA", method("Hira", r=4)),
    Row("MiSS", method("Miss", r=4)),
    Row("MiSS, bat", method("Miss", r=4, init_weights="bat")),
    Row("MiSS, mini", method("Miss", r=4, mini_r=4, init_weights="mini")),
    Row("SHiRA", method("Shira", r=2)),
    Row("C3A", method("C3A", block_size=8)),
    Row("RoAd", method("Road", group_size=8)),
    Row("GraLoRA", method("Gralora", r=8, gralora_k=2)),
    Row("DeLoRA", method("Delora", r=4)),
    Row("OSF", method("OSF", effective_rank=8), merges=False, copies=False),
    Row("TinyLoRA", method("TinyLora"), learning_rate=0.1),
    Row("GLoRA", method("Glora", r=4)),
    Row("Lily", method("Lily", r=4), merges=False),
    Row("PSOFT", method("Psoft", r=4)),
    Row("AdaMSS", method("Adamss", r=8, num_subspaces=2)),
    Row("DEFT", method("Deft", r=4)),
    Row("DEFT, qr", method("Deft", r=4, decomposition_method="qr")),
    Row("FRoD", method("Frod", progressbar=False)),
    Row("PEANuT", method("Peanut", r=4)),
    Row("SuperTuning", method("Supertuning")),
    Row(
        "Poly",
        method("Poly", r=4, n_tasks=1, n_skills=2),
        merges=False,
        inputs=lambda: {"task_ids": torch.zeros(2, dtype=torch.int64)},
    ),
    Row("BEFT", method("Beft"), merges=False),
    Row("LN tuning", lambda: peft.LNTuningConfig(task_type="CAUSAL_LM")),
    Row(
        "Trainable tokens",
        method("TrainableTokens", target_modules=["embed_tokens"], token_indices=[3, 5]),
        embeddings=True,
    ),
    Row("Prompt tuning", prompt("PromptTuning", num_virtual_tokens=2), merges=False, embeddings=True),
    Row(
        "P-tuning", prompt("PromptEncoder", num_virtual_tokens=2, encoder_hidden_size=16), merges=False, embeddings=True
    ),
    Row("Prefix tuning", prompt("PrefixTuning", num_virtual_tokens=2), merges=False, embeddings=True),
    Row(
        "CPT",
        prompt("CPT", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[2, 4]),
        merges=False,
        embeddings=True,
        inputs=lambda: {"input_type_mask": torch.full((2, 8), 4)},
    ),
    Row("Cartridge", prompt("Cartridge", num_virtual_tokens=2), merges=False, embeddings=True),
    Row("Adaption prompt", prompt("AdaptionPrompt", adapter_len=2, adapter_layers=1), merges=False, learning_rate=0.1),
    Row("Shadow", lambda: peft.ShadowConfig(task_type="CAUSAL_LM"), merges=False),
]


@dataclass
class Result:
    """What one row did over one base. A step that failed holds the error in the place of "ok"."""

    name: str
    base: str
    train: str = "-"
    save: str = "-"
    copy: str = "-"
    merge: str = "-"
    unmerge: str = "-"
    disable: str = "-"
    bfloat16: str = "-"
    refused: str = ""
    merge_error: float | None = None  # of the output, over the effect of the adapter
    rounding: float | None = None  # the largest of `merge_errors`
    initialization: float | None = None  # the largest of `initialization_errors`
    losses: list[float] = field(default_factory=list)

    def failures(self) -> dict[str, str]:
        steps = {key: value for key, value in asdict(self).items() if isinstance(value, str)}
        for key in ("name", "base", "refused"):
            del steps[key]
        return {key: value for key, value in steps.items() if value not in ("ok", "-")}


def make_base(row: Row, base: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model, options = llama(dtype=dtype), dict(BASES[base])
    scheme = options.pop("scheme")
    if scheme is not None:
        qk.quantize_(model, scheme, embeddings=row.embeddings and not options, **options)
    return model


def adapt(row: Row, base: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model, config = make_base(row, base, dtype), row.config()
    if row.prepare is not None:
        row.prepare(model, config)
        model.zero_grad()
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    model.eval()
    torch.manual_seed(2)
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits.clone()


def storage(model: nn.Module) -> list[Tensor]:
    """Copies of all that the layers of the base store: the quantized ones, or every one of a float model."""
    return [
        tensor.clone()
        for name, module in model.named_modules()
        if (isinstance(module, Storage) or (type(module) in (nn.Linear, nn.Embedding) and "base_layer" in name))
        and "modules_to_save" not in name
        for tensor in module.state_dict().values()
    ]


def train(model: nn.Module, row: Row) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=row.learning_rate)
    model.train()
    losses = []
    for step in range(STEPS + 1):
        torch.manual_seed(3)
        loss = model(input_ids=IDS, labels=IDS, **row.inputs()).loss
        losses.append(loss.item())
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if hasattr(model.base_model, "update_and_allocate"):
                model.base_model.update_and_allocate(step + 1)
    return losses


def step(result: Result, name: str, action: Callable[[], str]) -> bool:
    """Run one step; its outcome, or the error, goes into the result. True if it held."""
    try:
        outcome = action()
    except Exception as error:
        outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    setattr(result, name, outcome)
    return outcome == "ok"


def same(got: Tensor, expected: Tensor, what: str, exact: bool) -> str:
    if torch.equal(got, expected) or (not exact and torch.allclose(got, expected, 1e-5, 1e-6)):
        return "ok"
    return f"{what} differs by {((got - expected).norm() / expected.norm()).item():.1e}"


def run(row: Row, base: str) -> Result:
    """Create, train, save and load, switch off, merge, unmerge, merge and unload; then train in bfloat16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _run(row, base)


def _run(row: Row, base: str) -> Result:
    result = Result(row.name, base)
    try:
        model = adapt(row, base)
    except Exception as error:
        result.refused = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return result
    exact = base != "float"
    result.initialization = max(initialization_errors(model).values(), default=None)
    before, original = storage(model), logits(make_base(row, base))
    created = storage(model)

    def check_training() -> str:
        result.losses = train(model, row)
        if not result.losses[-1] < result.losses[0]:
            return f"loss {result.losses}"
        kept = zip(storage(model), created, strict=True)
        return "ok" if all(torch.equal(now, then) for now, then in kept) else "the base was changed"

    if not step(result, "train", check_training):
        return result
    separate = logits(model, **row.inputs())

    def check_saving() -> str:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            fresh = make_base(row, base)
            if row.prepare is not None:
                row.prepare(fresh, row.config())
                fresh.zero_grad()
            torch.manual_seed(1)  # as in `adapt`: some decompose the weight by random projections
            return same(
                logits(peft.PeftModel.from_pretrained(fresh, folder), **row.inputs()), separate, "output", exact
            )

    step(result, "save", check_saving)

    def check_switch() -> str:
        with model.disable_adapter():
            off = logits(model, **row.inputs())
        if row.changes_base:
            return "ok" if off.isfinite().all() else "not finite"
        return same(off, original, "output", exact)

    step(result, "disable", check_switch)

    def check_copies() -> str:
        copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
        outcomes = [same(logits(twin, **row.inputs()), separate, "output of a copy", exact) for twin in copies]
        return next((outcome for outcome in outcomes if outcome != "ok"), "ok")

    if row.copies:
        step(result, "copy", check_copies)
    if row.merges:
        check_merging(result, row, model, before, separate, original)
    step(result, "bfloat16", lambda: check_bfloat16(row, base))
    return result


def check_merging(
    result: Result, row: Row, model: nn.Module, before: list[Tensor], separate: Tensor, original: Tensor
) -> None:
    def check_merge() -> str:
        model.merge_adapter()
        merged = logits(model)
        result.merge_error = ((merged - separate).norm() / separate.norm()).item()
        result.rounding = max(merge_errors(model).values(), default=None)
        bound = {"float": 1e-4, "w8a8": 0.05, "w4a8-g32": 0.5}.get(result.base, 0.05)
        return "ok" if result.merge_error < bound else f"output differs by {result.merge_error:.2f}"

    def check_unmerge() -> str:
        model.unmerge_adapter()
        if result.base == "float":
            error = (logits(model) - separate).norm() / separate.norm()
            return "ok" if error < 1e-3 else f"output differs by {error:.1e}"
        kept = zip(storage(model), before, strict=True)
        if result.base in ("w8a8", "w4a8-g32") and not all(torch.equal(now, then) for now, then in kept):
            return "the base was changed"
        return "ok"

    def check_unloading() -> str:
        merged = logits(model.merge_and_unload())
        error = ((merged - separate).norm() / separate.norm()).item()
        return "ok" if error <= result.merge_error * 1.5 + 1e-4 else f"merge_and_unload differs by {error:.1e}"

    if (
        hasattr(model, "merge_adapter")
        and step(result, "merge", check_merge)
        and step(result, "unmerge", check_unmerge)
    ):
        step(result, "merge", check_unloading)


def check_bfloat16(row: Row, base: str) -> str:
    """Without autocast: the base in bfloat16, the adapters in the dtype that PEFT gives them."""
    losses = train(adapt(row, base, torch.bfloat16), row)
    return "ok" if losses[-1] < losses[0] else f"loss {losses}"
