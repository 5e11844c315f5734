"""A frozen weight as a parameter among others: averages, casts, copies, sharding; and the check of its values."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels as qk
from qkernels import QuantEmbedding, QuantLinear
from qkernels.formats import rules
from qkernels.nn.stored_parameter import StoredParameter

SCHEMES = ["w8a8", "w4a8-g32-asym", "w4a8-g32-min"]
K, N = 70, 33


def model_of(scheme: str = "w8a8", **kind) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, K), nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 5))
    qk.quantize_(model, scheme, embeddings="mode" not in kind, **kind)
    return model


def storage(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith("bias")}


def assert_same_storage(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    for name, tensor in before.items():
        assert_same_bits(after[name], tensor, name)


def test_the_integers_are_no_floats():
    model = model_of()
    floats = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    assert floats == ["1.bias", "3.bias"]
    assert model[1].scales.dtype == model.state_dict()["1.scales"].dtype == torch.float32
    assert all(type(tensor) is torch.Tensor for tensor in model.state_dict().values())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "average",
    [
        {},
        {"avg_fn": get_ema_avg_fn(0.9)},
        {"avg_fn": get_ema_avg_fn(0.999)},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.97)},
        {"use_buffers": True},
    ],
    ids=["swa", "ema", "slow", "multi", "buffers"],
)
def test_an_averaged_model_keeps_its_integers(scheme, average):
    model = model_of(scheme)
    before, averaged = storage(model), AveragedModel(model, **average)
    for _ in range(6):
        with torch.no_grad():
            model[1].bias.add_(1.0)
        averaged.update_parameters(model)
    assert_same_storage(averaged.module, before)
    assert not torch.equal(averaged.module[1].bias, model[1].bias)


def by_copy(mean, new):
    mean.copy_(0.9 * mean + 0.1 * new)


def by_data(mean, new):
    mean.data = 0.97 * mean.data + 0.03 * new.data


def by_lerp(mean, new):
    mean.lerp_(new, 0.1)


def by_detached_copy(mean, new):
    mean.detach().copy_(mean.detach() * 0.995 + new.detach() * 0.005)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("step", [by_copy, by_data, by_lerp, by_detached_copy])
@torch.no_grad()
def test_an_average_by_hand_keeps_the_integers(scheme, step):
    model = model_of(scheme)
    mean, before = copy.deepcopy(model), storage(model)
    for _ in range(5):
        for old, new in zip(mean.parameters(), model.parameters(), strict=True):
            step(old, new)
    assert_same_storage(mean, before)


@pytest.mark.parametrize("step", [by_copy, by_data, by_lerp, by_detached_copy, lambda a, b: a.mul_(0.9).add_(b)])
@torch.no_grad()
def test_an_average_of_other_integers_is_refused(step):
    model, other = model_of(), model_of()
    other[1].set_weight(qk.quantize_weight(torch.randn(N, K), "w8a8"))
    before = storage(model)
    for name in ("qweight", "scales"):
        with pytest.raises((RuntimeError, TypeError), match="integers of a frozen quantized weight cannot be"):
            step(model[1]._parameters[name], other[1]._parameters[name])
    assert_same_storage(model, before)


@torch.no_grad()
def test_averages_over_the_state_dict():
    """Floats are averaged and integers copied, as timm does, or left alone, as ultralytics does."""
    model = model_of("w4a8-g32-asym")
    mean, before = copy.deepcopy(model), storage(model)
    for _ in range(5):
        new = model.state_dict()
        for name, value in mean.state_dict().items():
            value.lerp_(new[name], 0.1) if value.is_floating_point() else value.copy_(new[name])
    assert_same_storage(mean, before)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_truncated_average_over_the_state_dict_is_noticed(scheme):
    model = model_of(scheme)
    mean, decay = copy.deepcopy(model), 0.9999

    def average():
        for old, new in zip(mean.state_dict().values(), model.state_dict().values(), strict=True):
            old.copy_(decay * old + (1.0 - decay) * new)

    average()
    with pytest.raises(RuntimeError, match="averaged in place and truncated"):
        average()
    mean.load_state_dict(model.state_dict())
    assert_same_storage(mean, model.state_dict())
    for name, tensor in mean.state_dict().items():  # other integers, meant
        if name.endswith("qweight"):
            tensor.copy_(tensor.flip(0))
    mean.state_dict()


def casts():
    for dtype in (torch.bfloat16, torch.float16):
        yield lambda model, dtype=dtype: model.to(dtype)
        yield lambda model, dtype=dtype: model.type(dtype)

        def loop(model, dtype=dtype):
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)

        yield loop


@pytest.mark.parametrize("cast", list(casts()))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_casts_leave_integers_and_scales(scheme, cast):
    model = model_of(scheme)
    before = storage(model)
    cast(model)
    assert_same_storage(model, before)
    assert model[1].bias.dtype != torch.float32


def test_a_cast_of_every_parameter_is_harmless_or_refused():
    model = model_of()
    before = storage(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert_same_storage(model, before)
    with pytest.raises(TypeError, match=r"expected torch.int32, got torch.float16: the integers"):
        model[1]._parameters["scales"].data = model[1]._parameters["scales"].data.to(torch.float16)


def test_integers_cannot_be_trained():
    model = model_of()
    with pytest.raises(RuntimeError, match="train adapters, or quantize with mode='qat'"):
        model.requires_grad_(True)
    for parameter in model.parameters():
        with pytest.raises(RuntimeError, match="is_floating_point"):
            if not parameter.is_floating_point():
                parameter.requires_grad = True
            else:
                raise RuntimeError("is_floating_point")


def test_scales_can_be_changed_in_place():
    layer = model_of()[1]
    before = layer.dequantize()
    layer.scales.mul_(2.0)
    layer.scales.data.mul_(2.0)
    assert_same_bits(layer.dequantize(), 4.0 * before)
    layer.scales.data = layer.scales / 4.0
    assert_same_bits(layer.dequantize(), before)
    layer.scales = nn.Parameter(layer.scales * 2.0, requires_grad=False)
    layer.state_dict()["scales"].mul_(2.0)
    assert_same_bits(layer.dequantize(), 4.0 * before)
    assert isinstance(layer._parameters["scales"], StoredParameter)


@pytest.mark.parametrize("scheme", ["w8a8-g32", "w4a8-g64-asym"])
def test_column_scales_follow_an_edit(scheme):
    torch.manual_seed(1)
    layer = QuantLinear.from_float(nn.Linear(K, N), scheme, grad_dtype="int8")
    x = torch.randn(4, K, requires_grad=True)
    layer(x).sum().backward()
    layer.scales.data.mul_(4.0)
    torch.manual_seed(2)
    (edited,) = torch.autograd.grad(layer(x).sum(), x)
    fresh = QuantLinear.from_float(nn.Linear(K, N), scheme, grad_dtype="int8")
    fresh.load_state_dict(layer.state_dict())
    torch.manual_seed(2)
    (expected,) = torch.autograd.grad(fresh(x).sum(), x)
    assert_same_bits(edited, expected)


def test_copies_keep_the_kind_of_parameter():
    model = model_of("w4a8-g32-asym")
    x, file = torch.tensor([[1, 5]]), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same_bits(other(x), model(x))
        stored = [parameter for parameter in other.parameters() if not parameter.is_floating_point()]
        assert all(isinstance(parameter, StoredParameter) for parameter in stored) and len(stored) == 9
    assert_same_bits(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), model(x))
    assert_same_bits(torch.func.functional_call(model, model.state_dict(), (x,)), model(x))
    meta = model_of("w4a8-g32-asym").to("meta")
    meta.load_state_dict(dict(model.named_parameters()), assign=True)
    assert_same_bits(meta(x), model(x))


def test_weights_only_loading():
    file = io.BytesIO()
    torch.save({"state": model_of().state_dict(), "parameters": list(model_of().parameters())}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in loaded["state"].values())


def test_the_first_parameter_has_the_dtype_of_the_layer():
    """Which many take for that of a model: `next(model.parameters()).dtype`."""
    layer = QuantLinear.from_float(nn.Linear(8, 8, dtype=torch.bfloat16), "w4a8-g32")
    assert next(layer.parameters()).dtype == torch.bfloat16
    assert next(pickle.loads(pickle.dumps(layer)).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["qat", "int8"])
def test_a_mode_has_no_names_of_another(mode):
    layer = QuantLinear(8, 8, mode=mode)
    shown = ("qweight", "scales") if mode == "int8" else ()  # the entries of the state dict, which are no parameters
    for name in ("qweight", "scales", "zeros", "column_scales"):
        assert hasattr(layer, name) == (name in shown) and name not in layer._parameters, name
    assert "column_scales" not in QuantLinear(8, 8)._non_persistent_buffers_set


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_weights_of_inference_mode_can_be_used_in_training(scheme):
    with torch.inference_mode():
        model = model_of(scheme, mode="frozen", grad_dtype="int8")[1:]
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        for parameter in (model[0].bias, model[2].bias):
            assert parameter.is_inference()
    for layer in (model[0], model[2]):
        layer.bias = nn.Parameter(layer.bias.clone())
    model(torch.randn(2, K, requires_grad=True)).sum().backward()


def test_default_dtype_does_not_matter():
    model = nn.Sequential(nn.Embedding(20, K), nn.Linear(K, N))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        report = qk.quantize_(model, "w8a8", embeddings=True)
        assert len(report.quantized) == 2
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_offloaded_buffers(scheme):
    accelerate = pytest.importorskip("accelerate")
    model = model_of(scheme, mode="frozen", grad_dtype="int8")[1:]
    x = torch.randn(2, K)
    expected = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert_same_bits(model(x), expected)


def test_double_is_loud():
    with pytest.warns(UserWarning, match="stays in float32 under a cast to torch.float64"):
        layer = QuantLinear.from_float(nn.Linear(8, 8), "w8a8").double()
    assert layer.compute_dtype == layer.bias.dtype == torch.float32
    assert layer(torch.ones(1, 8)).dtype == torch.float32


FSDP = """
import sys, tempfile, torch, torch.distributed as dist, torch.multiprocessing as mp, qkernels as qk
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict, StateDictOptions
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 97), torch.nn.GELU(), torch.nn.Linear(97, 32))
        qk.quantize_(model, "w4a8-g32-asym", grad_dtype="int8")
        return model
    whole, model, x = make().bfloat16(), make(), torch.randn(4, 64)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    shards = {name: p.to_local().shape[0] for name, p in model.named_parameters()}
    assert shards["0.qweight"] == shards["0.scales"] == (49, 48)[rank], shards
    out = model(x.requires_grad_())
    out.sum().backward()
    assert torch.equal(out, whole(x.detach().bfloat16())), "forward"
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        for name, tensor in make().state_dict().items():
            assert torch.equal(full[name], tensor) and full[name].dtype == tensor.dtype, name
    state = model.state_dict()
    assert state["0.scales"].dtype == torch.float32
    dcp.save(state, checkpoint_id=folder + "/saved")
    with torch.no_grad():
        state["0.scales"].to_local().zero_()
        state["2.qweight"].to_local().zero_()
    assert not torch.equal(model(x), out)
    dcp.load(state, checkpoint_id=folder + "/saved")
    model.reshard()
    assert torch.equal(model(x), out), "loaded in place"
    model.load_state_dict(state)
    set_model_state_dict(model, get_model_state_dict(model))
    model.reshard()
    assert torch.equal(model(x), out), "load_state_dict"
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1],), 2)
"""


@pytest.mark.thorough
@pytest.mark.skipif(
    torch.__version__.startswith("2.10."), reason="FSDP of torch 2.10 takes parameters of floats only, not int8 weights"
)
def test_fsdp_shards_the_weight_and_does_not_cast_it(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(FSDP)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernels_quantize(scheme):
    """Each way to quantize calls the operator, and gives what the definition in plain torch gives."""
    weight = torch.randn(N, K)
    linear, embedding = nn.Linear(K, N), nn.Embedding(N, K)
    with torch.no_grad():
        linear.weight.copy_(weight)
        embedding.weight.copy_(weight)
    expected = rules.quantize_weight(weight, scheme)
    for make in (
        lambda: qk.quantize_weight(weight, scheme),
        lambda: QuantLinear.from_float(linear, scheme).quantized_weight(),
        lambda: QuantEmbedding.from_float(embedding, scheme).quantized_weight(),
    ):
        with Calls() as calls:
            got = make()
        assert "qkernels.quantize_weight.default" in calls.names
        assert isinstance(got, qk.QuantizedWeight)
        for name, tensor in expected._asdict().items():
            assert (tensor is None) == (getattr(got, name) is None)
            if tensor is not None:
                assert_same_bits(getattr(got, name), tensor, name)


@pytest.mark.parametrize("wrong", [None, [[1.0, 2.0]]])
def test_what_is_no_tensor_is_a_type_error(wrong):
    for function in (qk.quantize_weight, qk.quantize_activation):
        with pytest.raises(TypeError, match="must be a tensor, got"):
            function(wrong, "w8a8")


BROKEN = {
    "scales": [lambda t: t.fill_(float("nan")), lambda t: t.fill_(float("-inf")), lambda t: t.half(), lambda t: None,
               lambda t: t.tolist(), lambda t: t[:, :1]],
    "zeros": [lambda t: t.fill_(16), lambda t: None, lambda t: t.float()],
    "qweight": [lambda t: t.float(), lambda t: t[:-1], lambda t: None],
}  # fmt: skip


@pytest.mark.parametrize(("name", "change"), [(name, change) for name, changes in BROKEN.items() for change in changes])
@pytest.mark.parametrize("index", [0, 1], ids=["embedding", "linear"])
def test_each_door_refuses_broken_tensors(name, change, index):
    model = model_of("w4a8-g32-asym")
    before, key = storage(model), f"{index}.{name}"
    for strict, assign in ((True, False), (False, False), (True, True), (False, True)):
        state = {other: tensor.clone() for other, tensor in model.state_dict().items()}
        state[key] = change(state[key])
        if state[key] is None:
            del state[key]
        with pytest.raises(RuntimeError, match=rf"{key} (must|is missing)"):
            model.load_state_dict(state, strict=strict, assign=assign)
        assert_same_storage(model[index], {n[2:]: t for n, t in before.items() if n.startswith(str(index))})
    weight = copy.deepcopy(model[index].quantized_weight())
    weight = qk.QuantizedWeight(*(tensor.clone() for tensor in weight))
    with pytest.raises(ValueError, match=f"^{name} (must|is missing)"):
        model[index].set_weight(weight._replace(**{name: change(getattr(weight, name))}))
    assert_same_storage(model, before)


def test_the_8_bit_integer_without_a_negative_is_loaded():
    """Rounding gives no -128, but other writers' files hold it."""
    layer = QuantLinear(4, 2, bias=False)
    layer.load_state_dict(
        {"qweight": torch.full((2, 4), -128, dtype=torch.int8), "scales": torch.tensor([[0.5], [-1.0]])}
    )
    assert layer.dequantize().tolist() == [[-64.0] * 4, [128.0] * 4]
    assert torch.equal(layer(127 * torch.eye(4)), 127 * layer.dequantize().t())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-g16", "w4a8-g32", "w4a8-g32-asym"])
@pytest.mark.parametrize("scale", [-0.01, 0.0, 1e-39])
def test_scales_of_any_sign_and_size_are_used_kept_and_averaged(scheme, scale):
    """Rounding gives 8-bit scales that are positive, and none below 2^-96 / 15; other writers' files hold others."""
    model = nn.Sequential(model_of(scheme)[1])
    given = model[0].quantized_weight()
    scales = torch.full_like(given.scales, scale)
    scales[::3] *= -1.0
    model[0].set_weight(given._replace(scales=scales))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(2):
        averaged.update_parameters(model)
    loaded = nn.Sequential(QuantLinear(K, N, scheme=scheme, grad_dtype="int8"))
    loaded.load_state_dict(averaged.module.state_dict())
    assert_same_bits(loaded[0].scales, scales)
    x, weight = torch.randn(40, K, requires_grad=True), loaded[0].dequantize()
    out = loaded(x)
    exact = x @ weight.t() + loaded[0].bias
    assert ((out - exact).abs() <= 0.02 * x.abs().amax() * weight.abs().sum(dim=1) + 1e-6).all()
    grad_out = torch.randn(40, N)
    out.backward(grad_out)
    bound = 0.05 * grad_out.abs().amax() * weight.abs().sum(dim=0)
    assert ((x.grad - grad_out @ weight).abs() <= bound + N * 128 * 2.0**-96).all()  # rule 1 takes less for 0
