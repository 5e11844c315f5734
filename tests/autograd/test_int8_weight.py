"""`Int8Weight` is a whole tensor: each operation works or raises, and no write is lost."""

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_same_bits, run_python
from torch import nn

import qkernels as qk
from qkernels.autograd.int8_weight import Int8Weight, Int8WeightView
from qkernels.kernels import ops

K, N = 40, 24


def layer_of(dtype: torch.dtype = torch.float32) -> qk.QuantLinear:
    return qk.QuantLinear.from_float(nn.Linear(K, N).to(dtype), "w8a8", mode="int8")


WRITES = {
    "out=": lambda w: torch.zeros(N, K, out=w),
    "out= of itself": lambda w: torch.mul(w, 0, out=w),
    "rows": lambda w: w[:].zero_(),
    "row after row": lambda w: [w.select(0, i).zero_() for i in range(N)],
    "index": lambda w: w.__setitem__(slice(None), 0.0),
    "mask": lambda w: w.__setitem__(w == w, 0.0),
    "columns": lambda w: w[:, :].mul_(0),
    "view": lambda w: w.view(-1).zero_(),
    "view of a view": lambda w: w.view(-1).view(K, N).t().mul_(0),
    "transposed": lambda w: w.t().zero_(),
    "chunk": lambda w: [part.zero_() for part in w.chunk(3)],
    "split of columns": lambda w: [part.copy_(torch.zeros(N, 8)) for part in w.split(8, dim=1)],
    "unbind": lambda w: [row.fill_(0) for row in w.unbind()],
    "foreach": lambda w: torch._foreach_mul_([w[:5], w[5:]], 0.0),
    "data": lambda w: setattr(w, "data", torch.zeros(N, K, dtype=w.dtype)),
    "data in place": lambda w: w.data.zero_(),
    "data of a view": lambda w: w.view(-1).data.zero_(),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(nn.utils.parameters_to_vector([w]) * 0, [w]),
    "diagonals": lambda w: [w.diagonal(i).zero_() for i in range(-N, K)],
    "init": lambda w: nn.init.zeros_(w),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", WRITES)
def test_no_write_is_lost(write, dtype):
    weight = layer_of(dtype).weight
    alias = weight.detach()
    assert alias.dequantize().any()
    with torch.no_grad():
        WRITES[write](weight)
    assert not weight.dequantize().any() and weight.dtype == dtype
    if write not in ("data", "vector_to_parameters"):  # these give the weight other memory, as of any tensor
        assert not alias.dequantize().any()
        assert weight._version > 0 or write.startswith("data")


def test_a_write_leaves_other_rows_as_they_are():
    weight = layer_of().weight.detach()
    before = weight.clone()
    weight[3] = 5.0
    weight[-2:, 7] = -9.0
    expected = before.dequantize()
    expected[3] = 5.0
    assert_same_bits(weight.dequantize()[[*range(3), *range(4, N - 2)]], expected[[*range(3), *range(4, N - 2)]])
    torch.testing.assert_close(weight.dequantize()[3], expected[3])
    assert (weight.dequantize()[-2:, 7] == -9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_in_float32(dtype):
    qweight, scales, _ = ops.quantize_weight(torch.randn(64, 256), "w8a8")
    start = (qweight * scales).double()
    weight = Int8Weight(qweight.clone(), scales.clone(), dtype)
    for _ in range(1000):
        weight.mul_(1.0)
    assert_same_bits(weight.qweight, qweight)
    assert_same_bits(weight.scales, scales)
    step = torch.full((64, 256), 1e-4, dtype=dtype)
    for _ in range(1000):
        weight.sub_(step)
    moved = ((weight.qweight * weight.scales).double() - start).mean().item()
    assert abs(moved + 0.1) < 0.002
    weight.lerp_(step, 1e-3)  # torch wants operands of one dtype here
    values = weight.dequantize(torch.float32)
    other = Int8Weight(torch.zeros_like(qweight), torch.ones_like(scales), dtype)
    other.copy_(values)  # values on the grid are taken over exactly
    assert_same_bits(other.dequantize(torch.float32), values)


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_floats_of_a_weight_that_holds_minus_128_are_taken_over_exactly(scale):
    qweight = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    qweight[:, 3] = -128
    weight = Int8Weight(torch.zeros_like(qweight), torch.ones(N, 1), torch.float32)
    weight.copy_(qweight * torch.full((N, 1), scale))
    assert_same_bits(weight.qweight, qweight)
    assert_same_bits(weight.scales, torch.full((N, 1), scale))


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.data_ptr(),
        lambda w: w.storage(),
        lambda w: w.__dlpack__(),
        lambda w: w.view(torch.int32),
        lambda w: w.set_(torch.zeros(N, K)),
        lambda w: w.t().share_memory_(),
        lambda w: setattr(w.t(), "data", torch.zeros(K, N)),
    ],
)
def test_what_needs_the_memory_of_floats_is_refused(use):
    with pytest.raises(NotImplementedError, match="Int8Weight"):
        use(layer_of().weight.detach())


def test_resizing_and_wrong_data_are_refused():
    weight = layer_of().weight.detach()
    with pytest.raises(RuntimeError, match="cannot be resized"):
        weight.resize_(3, K)
    with pytest.raises(RuntimeError, match=r"float tensor of shape \[24, 40\], got torch.float32 of shape \[3\]"):
        weight.data = torch.zeros(3)


def test_reading():
    weight = layer_of().weight
    values = weight.dequantize()
    assert weight.tolist() == values.tolist() and weight[0, 0].item() == values[0, 0].item()
    array = weight.detach().numpy()
    assert (array == values.numpy()).all() and (torch.as_tensor(array.copy()) == values).all()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1.0
    with pytest.raises(RuntimeError, match="detach"):
        weight.numpy()
    assert isinstance(weight[2:5], Int8Weight) and isinstance(weight[:, 2:5], Int8WeightView)
    for got, expected in ((weight[:, 2:5], values[:, 2:5]), (weight.t() @ values, values.t() @ values)):
        assert_same_bits((got + 0).detach(), expected)
    assert weight.untyped_storage().data_ptr() == weight.qweight.data_ptr()
    assert weight.is_contiguous() and not weight.t().is_contiguous()
    assert isinstance(torch.empty_like(weight), Int8Weight) and type(weight.new_zeros(N, K)) is torch.Tensor


def test_data_can_be_swapped_and_restored():
    layer, x = layer_of(), torch.randn(3, K)
    out, saved, alias = layer(x), layer.weight.detach().clone(), layer.weight.data
    with torch.no_grad():
        layer.weight.add_(1.0)
    layer.weight.data = saved
    assert_same_bits(layer(x).detach(), out.detach())
    assert not torch.equal(alias.dequantize(), layer.weight.dequantize())


def test_copies_files_and_processes():
    weight = layer_of(torch.bfloat16).weight
    weight.mark = "kept"
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=True), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert isinstance(twin, Int8Weight) and isinstance(twin, nn.Parameter) and twin.requires_grad
        assert twin.dtype == torch.bfloat16 and twin.mark == "kept"
        assert_same_bits(twin.qweight, weight.qweight)
        assert twin.qweight.data_ptr() != weight.qweight.data_ptr()


def test_shared_memory():
    """In a process of its own, which a segmentation fault would end."""
    code = """
import torch, qkernels as qk
import torch.multiprocessing as mp
def work(net): net[0].weight.data.zero_()
if __name__ == "__main__":
    net = torch.nn.Sequential(torch.nn.Linear(32, 16))
    qk.quantize_(net, "w8a8", mode="int8")
    net.share_memory()
    assert all(p.is_shared() for p in net.parameters())
    process = mp.get_context("fork").Process(target=work, args=(net,))
    torch.set_num_threads(1)
    process.start(); process.join()
    assert process.exitcode == 0 and not net[0].weight.dequantize().any()
"""
    run_python(code)


def test_skeletons_on_the_meta_device():
    real, x = layer_of(), torch.randn(3, K)
    state = real.state_dict()

    def skeleton():
        return qk.QuantLinear(K, N, True, "w8a8", mode="int8", device="meta")

    to_empty = skeleton().to_empty(device="cpu")
    to_empty.load_state_dict(state)
    skipped = nn.utils.skip_init(qk.QuantLinear, K, N, True, "w8a8", mode="int8")
    skipped.load_state_dict(state)
    assigned = skeleton()
    assigned.load_state_dict(state, assign=True)
    for layer in (to_empty, skipped, assigned):
        assert isinstance(layer.weight, Int8Weight) and layer.weight.requires_grad
        assert_same_bits(layer(x).detach(), real(x).detach())
    with pytest.warns(UserWarning, match="assign=True"):
        skeleton().load_state_dict(real.state_dict())


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        layer = qk.QuantLinear(K, N, mode="int8")
    assert isinstance(layer.weight, Int8Weight) and layer.weight.is_meta and layer.weight.requires_grad
    with pytest.raises(NotImplementedError, match="cannot be offloaded"):
        accelerate.cpu_offload(nn.Sequential(layer_of()), torch.device("cpu"))


def test_averages_of_state_dicts_are_refused_and_of_parameters_are_right():
    layer = layer_of()
    scales = layer.state_dict()["scales"]
    other = copy.deepcopy(layer).state_dict()["scales"]
    for average in (
        lambda: other.lerp_(scales, 0.1),
        lambda: other.mul_(0.9),
        lambda: other * 0.9 + scales * 0.1,
        lambda: torch._foreach_mul_([other], 0.9),
        lambda: copy.deepcopy(other).add_(scales),
    ):
        with pytest.raises(RuntimeError, match="AveragedModel"):
            average()
    assert scales.max() > 0 and torch.equal(scales, other)
    other.copy_(scales)
    average = torch.optim.swa_utils.AveragedModel(layer, avg_fn=lambda mean, new, _: 0.9 * mean + 0.1 * new)
    start = layer.weight.dequantize()
    average.update_parameters(layer)
    with torch.no_grad():
        layer.weight.add_(1.0)
    average.update_parameters(layer)
    moved = (average.module.weight.dequantize() - start).mean()
    assert abs(moved - 0.1) < 0.002


def test_a_layer_trains_a_copy_of_what_it_is_given():
    layer, weight = layer_of(), qk.quantize_weight(torch.randn(N, K), "w8a8")
    before = weight.qweight.clone()
    layer.set_weight(weight)
    with torch.no_grad():
        layer.weight.zero_()
    assert_same_bits(weight.qweight, before)


def test_runs_repeat_with_the_seed():
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        weight = layer_of().weight.detach()
        torch.manual_seed(seed)
        weight.add_(1e-3)
        results.append(weight.qweight)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
