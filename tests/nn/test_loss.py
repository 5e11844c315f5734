"""`linear_cross_entropy`: loss and gradient against float64, within bounds that follow from its rules."""

import op_samples
import pytest
import reference_ops
import torch
from helpers import assert_same_bits, run_python
from loss_bounds import exact, gradient_bound, loss_bound, lse_bound
from op_samples import INT_SCHEMES

import qkernels as qk
from qkernels import QuantScheme
from qkernels.kernels import isa, ops, reference

CHUNK = reference.LOSS_CHUNK
# Each option alone, and those that go together.
OPTIONS = [
    {},
    {"softcap": 5.0},
    {"softcap": 0.1},  # no float32 number; all logits are at the cap
    {"softcap": 1e6},
    {"z_loss": 0.01},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01, "label_smoothing": 0.3},
    {"z_loss": 0.01, "softcap": 2.0},
]


def case(scheme: str, rows: int = 13, out_features: int = 2 * CHUNK + 33, in_features: int = 70, bias: bool = True):
    """hidden, target (some ignored), the weight's storage, bias."""
    draw = op_samples.Draw(f"{scheme} {rows} {out_features}")
    hidden = draw.floats(rows, in_features)
    target = torch.randint(0, out_features, (rows,), generator=draw.generator)
    target[::5] = -100
    weight = draw.weight(out_features, in_features, QuantScheme.parse(scheme))
    return hidden, target, weight, draw.floats(out_features) if bias else None


@pytest.mark.parametrize("terms", OPTIONS, ids=str)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-ag32", "w4a8", "w4a8-g32-asym", "w8a8-g64-ag32", "w4a8-g32-min"])
def test_loss_and_gradient_are_within_their_bounds(scheme, terms):
    hidden, target, storage, bias = case(scheme)
    dither = torch.randint(2**32, target.shape)
    losses, lse, grad = ops.linear_cross_entropy(hidden, target, *storage, bias, scheme, dither, **terms)
    logits = ops.linear(hidden, *storage, bias, scheme).double().requires_grad_()
    expected, y, exact_lse = exact(logits, target, **terms)
    expected.sum().backward()
    y, exact_lse, expected = y.detach(), exact_lse.detach(), expected.detach()
    valid = target != -100
    assert ((losses - expected).abs() <= loss_bound(expected, y, exact_lse, **terms)).all()
    assert ((lse - exact_lse).abs() <= lse_bound(y, exact_lse, terms.get("softcap", 0.0)))[valid].all()
    weight = op_samples.exact_weight(*storage, hidden.shape[1], scheme)
    bound = gradient_bound(logits.detach(), weight, storage, scheme, target, terms)
    assert ((grad - logits.grad @ weight).abs() <= bound)[valid].all()
    for result in (losses, lse, grad):
        assert (result[~valid] == 0).all()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym-ag64"])
@pytest.mark.parametrize("terms", OPTIONS, ids=str)
def test_options_equal_the_reference_on_every_isa_and_thread_count(each_isa, scheme, terms):
    hidden, target, storage, bias = case(scheme)
    arguments = (hidden, target, *storage, bias, scheme, torch.randint(2**32, target.shape))
    expected = reference_ops.linear_cross_entropy(*arguments, **terms)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(ops.linear_cross_entropy(*arguments, **terms), expected, strict=True):
            assert_same_bits(a, b, f"{each_isa} {scheme} {threads}")


def test_rows_do_not_depend_on_their_companions():
    """Also beyond the rows that are worked on together, and whichever are ignored."""
    hidden, target, storage, bias = case("w8a8", rows=1100, out_features=300, in_features=40)
    dither = torch.randint(2**32, target.shape)
    whole = ops.linear_cross_entropy(hidden, target, *storage, bias, "w8a8", dither)
    for rows in (slice(1, 2), slice(500, 530), slice(3, 1100)):
        part = ops.linear_cross_entropy(hidden[rows], target[rows], *storage, bias, "w8a8", dither[rows])
        for a, b in zip(part, whole, strict=True):
            assert_same_bits(a, b[rows], str(rows))


@pytest.mark.parametrize("scheme", INT_SCHEMES[::5])
def test_exponential_is_within_its_bound(scheme):
    """By two classes: the log-sum-exp of 0 and -x is log(1 + exp(-x))."""
    x = torch.linspace(-87, 0, 200_001)
    y = reference.exp_nonpositive(x).double()
    assert ((y / x.double().exp() - 1).abs() <= 2.0**-22).all()
    special = torch.tensor([-torch.inf, -88.0, -1e30, 0.0, torch.nan])
    assert_same_bits(reference.exp_nonpositive(special), torch.tensor([0.0, 0.0, 0.0, 1.0, torch.nan]))


def test_gradient_is_unbiased_and_its_error_falls_with_the_number_of_seeds():
    hidden, target, storage, _ = case("w8a8", rows=16, out_features=900, bias=False)
    hidden = hidden * 0.02
    logits = ops.linear(hidden, *storage, None, "w8a8").double().requires_grad_()
    exact(logits, target)[0].sum().backward()
    expected = logits.grad @ op_samples.exact_weight(*storage, 70, "w8a8")

    def error(grads):
        return ((sum(grads) / len(grads) - expected).norm() / expected.norm()).item()

    grads = [
        ops.linear_cross_entropy(hidden, target, *storage, None, "w8a8", torch.randint(2**32, (16,)))[2].double()
        for _ in range(256)
    ]
    one = sum(error([grad]) for grad in grads) / len(grads)
    assert error(grads) < 2 * one / 16  # the square root of 256
    assert one < 0.01


@pytest.mark.parametrize("softcap", [2.0**-126, 1e-20, 1e3, 1e6, 1e30, 3e38])
def test_a_soft_cap_of_any_size_is_exact(each_isa, softcap):
    """A large cap leaves the logits as they are, a small one makes them all equal."""
    hidden, target, storage, bias = case("w8a8")
    arguments = (hidden, target, *storage, bias, "w8a8", torch.randint(2**32, target.shape))
    results = ops.linear_cross_entropy(*arguments, softcap=softcap)
    for a, b in zip(results, reference_ops.linear_cross_entropy(*arguments, softcap=softcap), strict=True):
        assert_same_bits(a, b, f"{each_isa} {softcap}")
    logits = ops.linear(hidden, *storage, bias, "w8a8").double()
    expected, y, lse = exact(logits, target, softcap=softcap)
    assert ((results[0] - expected).abs() <= loss_bound(expected, y, lse, softcap=softcap)).all()


def test_an_infinite_soft_cap_is_none(each_isa):
    hidden, target, storage, bias = case("w8a8")
    arguments = (hidden, target, *storage, bias, "w8a8", torch.randint(2**32, target.shape))
    expected = ops.linear_cross_entropy(*arguments)
    for softcap in (float("inf"), 1e40):
        for compute in (ops.linear_cross_entropy, reference_ops.linear_cross_entropy):
            for a, b in zip(compute(*arguments, softcap=softcap), expected, strict=True):
                assert_same_bits(a, b, f"{each_isa} {softcap}")
    weight = torch.randn(40, 70)
    for head in (qk.QuantLinear.from_float(torch.nn.Linear(70, 40), "w8a8"), weight):
        plain = qk.linear_cross_entropy(hidden, head, target % 40)
        for softcap in (float("inf"), 1e40):
            assert_same_bits(qk.linear_cross_entropy(hidden, head, target % 40, softcap=softcap), plain)


@pytest.mark.parametrize("softcap", [1e-30, 0.3, 30.0, 1e6, 1e30, 3e38])
def test_float_and_quantized_heads_agree_on_soft_caps(softcap):
    head = qk.QuantLinear.from_float(torch.nn.Linear(16, 200), "w8a16")
    hidden, target = torch.randn(50, 16), torch.randint(200, (50,))
    loss = qk.linear_cross_entropy(hidden, head, target, softcap=softcap)
    weight = head.dequantize()
    expected = qk.linear_cross_entropy(hidden, weight, target, linear_bias=head.bias, softcap=softcap)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-6)


def test_dither_is_taken_modulo_2_32(each_isa):
    hidden, target, storage, bias = case("w8a8")
    dither = torch.randint(2**32, target.shape)
    for shift in (2**32, -(2**32), 2**62, -(2**62)):
        for compute in (ops.linear_cross_entropy, reference_ops.linear_cross_entropy):
            a, b = (compute(hidden, target, *storage, bias, "w8a8", d)[2] for d in (dither, dither + shift))
            assert_same_bits(a, b, f"{each_isa} {shift}")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_label_smoothing_adds_the_rows_of_the_weight_in_order(each_isa, scheme):
    """Large rows cancel, and what is left of their rounding shows: all other terms are those of one small row."""
    weight = torch.randn(CHUNK, 40)
    weight[:300] *= 2.0**40
    weight[:, 0] = 0.0
    weight[500, 0] = 10.0
    weight = torch.cat([weight, -weight[:300]])
    storage = qk.quantize_weight(weight, scheme)
    hidden, target = torch.zeros(3, 40), torch.full((3,), 500)
    hidden[:, 0] = 100.0
    arguments = (hidden, target, *storage, None, scheme, torch.randint(2**32, target.shape))
    expected = reference_ops.linear_cross_entropy(*arguments, label_smoothing=0.5)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for a, b in zip(ops.linear_cross_entropy(*arguments, label_smoothing=0.5), expected, strict=True):
            assert_same_bits(a, b, f"{each_isa} {scheme}")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_gradients(reduction, bias):
    """Through autograd, with leading dimensions and any upstream gradient; the bias is trainable."""
    linear = torch.nn.Linear(48, 1500, bias=bias)
    head = qk.QuantLinear.from_float(linear, "w8a8")
    hidden = torch.randn(3, 7, 48, requires_grad=True)
    target = torch.randint(0, 1500, (3, 7))
    target[0] = -100
    loss = qk.linear_cross_entropy(hidden, head, target, reduction=reduction)
    upstream = torch.rand_like(loss)
    grads = torch.autograd.grad(loss, [hidden, *head.parameters()][:1] + ([head.bias] if bias else []), upstream)
    x = hidden.detach().requires_grad_()
    logits = head(x)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction=reduction)
    exact_grads = torch.autograd.grad(expected.reshape(loss.shape), [x] + ([head.bias] if bias else []), upstream)
    torch.testing.assert_close(loss, expected.reshape(loss.shape), rtol=1e-5, atol=1e-5)
    assert (grads[0] - exact_grads[0]).norm() < 0.01 * exact_grads[0].norm()
    assert (grads[0][0] == 0).all()
    if bias:
        torch.testing.assert_close(grads[1], exact_grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["quantized", "float"])
def test_all_ignored(kind):
    head = qk.QuantLinear(16, 40, False, "w8a8") if kind == "quantized" else torch.randn(40, 16)
    hidden = torch.randn(4, 16, requires_grad=True)
    target = torch.full((4,), -100)
    assert qk.linear_cross_entropy(hidden, head, target).isnan()  # as torch's
    loss = qk.linear_cross_entropy(hidden, head, target, reduction="sum")
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all()
    assert qk.linear_cross_entropy(hidden[:0], head, target[:0], reduction="none").shape == (0,)


def test_classes_can_be_weighted():
    head, hidden, target = torch.randn(40, 16), torch.randn(9, 16), torch.randint(0, 40, (9,))
    target[2] = 7
    weight = torch.rand(40)
    arguments = {"weight": weight, "ignore_index": 7}
    for reduction in ("none", "sum", "mean"):
        loss = qk.linear_cross_entropy(hidden, head, target, reduction=reduction, **arguments)
        expected = torch.nn.functional.cross_entropy(hidden @ head.t(), target, reduction=reduction, **arguments)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("terms", [*OPTIONS, {"softcap": 2.0, "label_smoothing": 0.2}], ids=str)
def test_float_head_passes_gradcheck(terms, monkeypatch):
    monkeypatch.setattr("qkernels.nn.loss.LOGITS_AT_ONCE", 64)
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (31, 5), (31,)))
    target = torch.randint(0, 31, (6,))
    target[1] = -100

    def loss(hidden, weight, bias):
        return qk.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction="none", **terms)

    expected = exact(hidden @ weight.t() + bias, target, **terms)[0]
    torch.testing.assert_close(loss(hidden, weight, bias), expected)
    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_non_finite_rows_are_nan_and_leave_the_others_alone():
    hidden, target, storage, bias = case("w8a8")
    dither = torch.randint(2**32, target.shape)
    plain = ops.linear_cross_entropy(hidden, target, *storage, bias, "w8a8", dither)
    hidden[1, 3], hidden[7, 0] = torch.nan, torch.inf
    broken = ops.linear_cross_entropy(hidden, target, *storage, bias, "w8a8", dither)
    rows = torch.tensor([i not in (1, 7) for i in range(len(target))])
    for a, b in zip(broken, plain, strict=True):
        assert_same_bits(a[rows], b[rows])
        assert a[~rows].isnan().all()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8-asym"])
def test_classes_without_weight_do_not_coarsen_the_gradient(each_isa, scheme):
    """The row of a padding token is zero, and a zero row has a scale of 1."""
    float_weight = torch.randn(500, 64) * 0.02
    float_weight[0], float_weight[77] = 0.0, 0.0
    storage = qk.quantize_weight(float_weight, scheme)
    hidden, target = torch.randn(20, 64), torch.randint(1, 500, (20,))
    arguments = (hidden, target, *storage, None, scheme, torch.randint(2**32, (20,)))
    results = ops.linear_cross_entropy(*arguments)
    for a, b in zip(results, reference_ops.linear_cross_entropy(*arguments), strict=True):
        assert_same_bits(a, b, each_isa)
    logits = ops.linear(hidden, *storage, None, scheme).double().requires_grad_()
    exact(logits, target)[0].sum().backward()
    expected = logits.grad @ qk.dequantize_weight(*storage, 64, scheme).double()
    assert (results[2] - expected).norm() < 0.01 * expected.norm()


def test_a_class_can_be_masked_by_the_bias():
    hidden, target, storage, bias = case("w8a8")
    bias[:CHUNK], target[:] = -torch.inf, CHUNK + 1
    losses, _, grad = ops.linear_cross_entropy(hidden, target, *storage, bias, "w8a8", torch.zeros_like(target))
    logits = ops.linear(hidden, *storage, bias, "w8a8").double()
    torch.testing.assert_close(losses.double(), exact(logits, target)[0], rtol=1e-5, atol=1e-5)
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"target": torch.tensor([0, 40])}, RuntimeError, r"target must be in \[0, 40\) or -100 .*got 40"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must be torch.int64 of shape \[2\]"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
        ({"softcap": -1.0}, ValueError, r"softcap must be None or at least 2\^-126"),
        ({"softcap": 1e-50}, ValueError, r"softcap must be None or at least 2\^-126"),
        ({"softcap": float("nan")}, ValueError, r"softcap must be None or at least 2\^-126"),
        ({"z_loss": float("inf")}, ValueError, "z_loss must be finite"),
        ({"softcap": 1.0, "label_smoothing": 0.1}, ValueError, "softcap must be None with label_smoothing"),
        ({"linear_bias": torch.zeros(39)}, ValueError, r"linear_bias must have shape \[40\], got \[39\]"),
        ({"weight": torch.ones(40), "label_smoothing": 0.1}, ValueError, "weight must be None"),
        ({"weight": torch.ones(39)}, ValueError, r"weight must be float of shape \[40\], got torch.float32 of .*39"),
        ({"weight": torch.ones(40, dtype=torch.int64)}, ValueError, r"weight must be float of shape \[40\]"),
        ({"weight": torch.ones(40, device="meta")}, ValueError, "weight must be on cpu as hidden is, got meta"),
        ({"head": torch.nn.Linear(16, 40)}, TypeError, "head must be a QuantLinear"),
        ({"head": torch.zeros(40, 15)}, ValueError, r"head must have shape \[N, 16\]"),
        ({"head": torch.zeros(40, 16).bfloat16()}, ValueError, "head must be torch.float32 as hidden is"),
        ({"head": torch.zeros(40, 16), "linear_bias": torch.zeros(3)}, ValueError, "linear_bias must have shape"),
        ({"head": torch.zeros(40, 16), "target": torch.tensor([0, -1])}, RuntimeError, "target must be in"),
    ],
)
def test_wrong_arguments_are_named(changed, error, message):
    given = {"hidden": torch.zeros(2, 16), "head": qk.QuantLinear(16, 40, False), "target": torch.tensor([0, 1])}
    with pytest.raises(error, match=message):
        qk.linear_cross_entropy(**{**given, **changed})


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"softcap": -1.0}, r"softcap must be 0 or at least 2\^-126, got -1"),
        ({"softcap": 1e-50}, r"softcap must be 0 or at least 2\^-126, got 1e-50"),
        ({"softcap": float("nan")}, r"softcap must be 0 or at least 2\^-126, got nan"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"z_loss": float("inf")}, "z_loss must be finite, got inf"),
        ({"softcap": 1.0, "label_smoothing": 0.1}, "softcap must be 0 with label_smoothing"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_operator_refuses_terms_out_of_range(terms, message, device):
    hidden, target, storage, bias = case("w8a8", out_features=50)
    arguments = [tensor if tensor is None else tensor.to(device) for tensor in (hidden, target, *storage, bias)]
    with pytest.raises(RuntimeError, match=message):
        ops.linear_cross_entropy(*arguments, "w8a8", **terms)


def test_logits_are_never_held():
    """512 tokens of a vocabulary of 262144: the logits alone would take 512 MiB."""
    code = """
import resource, torch, qkernels as qk
from qkernels import QuantizedWeight
torch.set_num_threads(2)
head = qk.QuantLinear(640, 262144, False, "w8a8", dtype=torch.bfloat16)
head.qweight.data.random_(-127, 128)
head.scales.data.fill_(2e-4)
hidden = torch.randn(512, 640).bfloat16().requires_grad_()
target = torch.randint(0, 262144, (512,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
qk.linear_cross_entropy(hidden, head, target).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    assert float(run_python(code).stdout) < 64


@pytest.mark.parametrize("name", isa.supported())
def test_same_seed_same_bits(name):
    head = qk.QuantLinear.from_float(torch.nn.Linear(48, 700), "w8a8")
    hidden, target = torch.randn(9, 48).requires_grad_(), torch.randint(0, 700, (9,))

    def grad(seed):
        torch.manual_seed(seed)
        with isa.force(name):
            return torch.autograd.grad(qk.linear_cross_entropy(hidden, head, target), hidden)[0]

    assert_same_bits(grad(1), grad(1))
    assert not torch.equal(grad(1), grad(2))
