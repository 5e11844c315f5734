// qkernels._native: the core on NumPy arrays, without torch. For tests, tools and users of plain arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/api.h"
#include "cpu/isa.h"
#include "cpu/roofline.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

std::string shape_of(const py::array& a) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i != 0 ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

void expect_shape(const char* name, const py::array& a, const std::vector<int64_t>& shape) {
  bool ok = a.ndim() == static_cast<py::ssize_t>(shape.size());
  std::string expected;
  for (size_t i = 0; i < shape.size(); ++i) {
    ok = ok && a.shape(i) == shape[i];
    expected += (i != 0 ? ", " : "") + std::to_string(shape[i]);
  }
  if (!ok) throw std::invalid_argument(std::string(name) + " must have shape [" + expected + "], got " + shape_of(a));
}

qk::Matrix matrix(const char* name, const Array<float>& a) {
  if (a.ndim() != 2) throw std::invalid_argument(std::string(name) + " must be a matrix, got shape " + shape_of(a));
  return {a.data(), qk::DType::float32, a.shape(0), a.shape(1)};
}

// Zero points or minima, as the scheme says.
using Zeros = std::optional<py::array>;

qk::Weight weight(const py::array& qweight, const Array<float>& scales, const Zeros& zeros, int64_t k,
                  const std::string& scheme_name) {
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  if (k < 1 || (scheme.int_activations() && k > qk::kMaxReduction)) {
    throw std::invalid_argument("in_features must be between 1 and " + std::to_string(qk::kMaxReduction) + ", got " +
                                std::to_string(k));
  }
  const bool stored =
      scheme.weight->in_place() ? py::isinstance<Array<int8_t>>(qweight) : py::isinstance<Array<uint8_t>>(qweight);
  if (!stored) {
    throw std::invalid_argument("qweight must be a contiguous " +
                                std::string(scheme.weight->in_place() ? "int8" : "uint8") + " array for scheme " +
                                scheme_name);
  }
  const int64_t n = qweight.ndim() > 0 ? qweight.shape(0) : 0, groups = scheme.weight_groups(k);
  expect_shape("qweight", qweight, {n, scheme.packed_features(k)});
  expect_shape("scales", scales, {n, groups});
  if (zeros.has_value() == scheme.symmetric()) {
    throw std::invalid_argument(std::string("zeros ") + (scheme.symmetric() ? "must be None" : "is required") +
                                " for scheme " + scheme_name);
  }
  if (zeros.has_value()) {
    if (!(scheme.has_min() ? py::isinstance<Array<float>>(*zeros) : py::isinstance<Array<uint8_t>>(*zeros))) {
      throw std::invalid_argument("zeros must be a contiguous " + std::string(scheme.has_min() ? "float32" : "uint8") +
                                  " array for scheme " + scheme_name);
    }
    expect_shape("zeros", *zeros, {n, groups});
  }
  return {scheme, n, k, qweight.data(), scales.data(), zeros ? zeros->data() : nullptr};
}

// Plain threads, started for each call. The caller takes the first share, and those whose thread cannot be started.
qk::Parallel threads(int count) {
  if (count < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(count));
  const auto run = [](int64_t shares, void (*body)(int64_t, int64_t, void*), void* context) {
    qk::FirstError error;
    const auto work = [&](int64_t begin, int64_t end) { error.guard([&] { body(begin, end, context); }); };
    std::vector<std::thread> started;
    started.reserve(shares - 1);
    int64_t share = 1;
    try {
      for (; share < shares; ++share) started.emplace_back(work, share, share + 1);
    } catch (const std::exception&) {  // the system has no more threads, or no memory for one
    }
    work(0, 1);
    if (share < shares) work(share, shares);
    for (std::thread& thread : started) thread.join();
    error.rethrow();
  };
  return {count, run};
}

// What the core computes, while other Python threads run.
template <class F>
void without_gil(const F& f) {
  const py::gil_scoped_release released;
  f();
}

// The scale of static activations: [1] for a8s schemes, else none.
const float* activation_scale(const std::optional<Array<float>>& x_scale, const qk::Scheme& scheme) {
  if (x_scale.has_value() != scheme.static_activations) {
    throw std::invalid_argument(std::string("x_scale ") + (scheme.static_activations ? "is required" : "must be None") +
                                " for scheme " + qk::name_of(scheme));
  }
  if (!x_scale.has_value()) return nullptr;
  expect_shape("x_scale", *x_scale, {1});
  return x_scale->data();
}

py::tuple quantize_activation(const Array<float>& x, const std::string& scheme_name, int num_threads,
                              const std::optional<Array<float>>& x_scale) {
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  if (!scheme.int_activations()) throw std::invalid_argument("scheme must be an a8 scheme, got " + scheme_name);
  const qk::Matrix view = matrix("x", x);
  if (view.cols < 1) throw std::invalid_argument("x must have at least one column, got shape " + shape_of(x));
  const float* const static_scale = activation_scale(x_scale, scheme);
  Array<int8_t> q({view.rows, view.cols});
  Array<float> scales({view.rows, scheme.act_groups(view.cols)});
  const qk::Parallel parallel = threads(num_threads);
  auto* const q_data = q.mutable_data();
  auto* const scale_data = scales.mutable_data();
  without_gil([&] { qk::quantize_activation(view, scheme, static_scale, q_data, scale_data, parallel); });
  return py::make_tuple(q, scales);
}

Array<float> dequantize_weight(const py::array& qweight, const Array<float>& scales, const Zeros& zeros,
                               int64_t in_features, const std::string& scheme, int num_threads) {
  const qk::Weight w = weight(qweight, scales, zeros, in_features, scheme);
  Array<float> out({w.n, w.k});
  const qk::Parallel parallel = threads(num_threads);
  auto* const data = out.mutable_data();
  without_gil([&] { qk::dequantize_weight(w, data, parallel); });
  return out;
}

Array<float> linear(const Array<float>& x, const py::array& qweight, const Array<float>& scales, const Zeros& zeros,
                    const std::optional<Array<float>>& bias, const std::string& scheme, int num_threads,
                    const std::optional<Array<float>>& x_scale) {
  const qk::Matrix view = matrix("x", x);
  qk::Weight w = weight(qweight, scales, zeros, view.cols, scheme);
  w.x_scale = activation_scale(x_scale, w.scheme);
  if (bias) expect_shape("bias", *bias, {w.n});
  Array<float> out({view.rows, w.n});
  const qk::Parallel parallel = threads(num_threads);
  auto* const data = out.mutable_data();
  const qk::Bias floats = {bias ? bias->data() : nullptr, qk::DType::float32};
  without_gil([&] { qk::linear(view, w, floats, data, qk::DType::float32, parallel); });
  return out;
}

Array<float> linear_grad_input(const Array<float>& grad_out, const py::array& qweight, const Array<float>& scales,
                               const Zeros& zeros, int64_t in_features, const std::string& scheme, int num_threads) {
  const qk::Matrix view = matrix("grad_out", grad_out);
  const qk::Weight w = weight(qweight, scales, zeros, in_features, scheme);
  expect_shape("grad_out", grad_out, {view.rows, w.n});
  Array<float> out({view.rows, w.k});
  const qk::Parallel parallel = threads(num_threads);
  auto* const data = out.mutable_data();
  without_gil([&] { qk::linear_grad_input(view, w, data, qk::DType::float32, parallel); });
  return out;
}

Array<float> column_scales(const py::array& qweight, const Array<float>& scales, const Zeros& zeros,
                           int64_t in_features, const std::string& scheme, int num_threads) {
  const qk::Weight w = weight(qweight, scales, zeros, in_features, scheme);
  Array<float> out(w.k);
  const qk::Parallel parallel = threads(num_threads);
  auto* const data = out.mutable_data();
  without_gil([&] { qk::column_scales(w, data, parallel); });
  return out;
}

Array<float> int_grad_input(const Array<int8_t>& q_grad, const Array<float>& grad_scales, const py::array& qweight,
                            const Array<float>& scales, const Zeros& zeros, int64_t in_features,
                            const std::string& scheme, const std::optional<Array<float>>& column_scales,
                            int num_threads) {
  const qk::Weight w = weight(qweight, scales, zeros, in_features, scheme);
  if (w.n > qk::kMaxReduction) {
    throw std::invalid_argument("qweight must have at most " + std::to_string(qk::kMaxReduction) +
                                " rows for exact int32 sums, got shape " + shape_of(qweight));
  }
  const int64_t m = q_grad.ndim() > 0 ? q_grad.shape(0) : 0;
  expect_shape("q_grad", q_grad, {m, w.n});
  expect_shape("grad_scales", grad_scales, {m});
  const bool by_column = !w.scheme.row_scaled();
  if (column_scales.has_value() != by_column) {
    throw std::invalid_argument(std::string("column_scales ") + (by_column ? "is required" : "must be None") +
                                " for scheme " + scheme);
  }
  if (by_column) expect_shape("column_scales", *column_scales, {w.k});
  Array<float> out({m, w.k});
  const qk::Parallel parallel = threads(num_threads);
  auto* const data = out.mutable_data();
  const qk::QuantizedRows rows = {q_grad.data(), grad_scales.data(), m, w.n};
  const float* const columns = by_column ? column_scales->data() : nullptr;
  without_gil([&] { qk::int_grad_input(rows, w, columns, data, qk::DType::float32, parallel); });
  return out;
}

py::dict choose_linear(const std::string& scheme, int64_t m, int64_t n, int64_t k, int num_threads) {
  const qk::Choice choice = qk::choose_linear(qk::parse_scheme(scheme), m, n, k, num_threads);
  py::dict result;
  result["driver"] = choice.driver;
  result["reason"] = choice.reason;
  result["threads"] = choice.threads;
  return result;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cxx_standard"] = __cplusplus;
  info["isas"] = qk::compiled_isas();
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The qkernels core on NumPy arrays: float32 activations, weights in the canonical storage.";
  m.def("compiled_isas", &qk::compiled_isas, "ISAs in this build, in ascending order of preference.");
  m.def("supported_isas", &qk::supported_isas, "Those of them that this CPU and OS can run.");
  m.def("current_isa", &qk::current_isa, "The ISA in use.");
  m.def("force_isa", &qk::force_isa, py::arg("name"), "Use an ISA from now on, in all threads.");
  m.def("build_info", &build_info, "Compiler, language standard and ISAs of this build.");
  m.def("quantize_activation", &quantize_activation, py::arg("x"), py::arg("scheme"), py::arg("threads") = 1,
        py::arg("x_scale").none(true) = py::none(), "float32 [M, K] -> (int8 [M, K], float32 scales [M, groups]).");
  m.def("dequantize_weight", &dequantize_weight, py::arg("qweight"), py::arg("scales"), py::arg("zeros").none(true),
        py::arg("in_features"), py::arg("scheme"), py::arg("threads") = 1, "float32 [N, K].");
  m.def("linear", &linear, py::arg("x"), py::arg("qweight"), py::arg("scales"), py::arg("zeros").none(true),
        py::arg("bias").none(true), py::arg("scheme"), py::arg("threads") = 1,
        py::arg("x_scale").none(true) = py::none(), "float32 [M, K] -> float32 [M, N]; x_scale [1] for a8s schemes.");
  m.def("choose_linear", &choose_linear, py::arg("scheme"), py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("threads") = 1, "How `linear` computes a product: the driver, the reason for it, and the threads.");
  m.def("linear_grad_input", &linear_grad_input, py::arg("grad_out"), py::arg("qweight"), py::arg("scales"),
        py::arg("zeros").none(true), py::arg("in_features"), py::arg("scheme"), py::arg("threads") = 1,
        "float32 [M, N] -> float32 [M, K].");
  m.def("column_scales", &column_scales, py::arg("qweight"), py::arg("scales"), py::arg("zeros").none(true),
        py::arg("in_features"), py::arg("scheme"), py::arg("threads") = 1,
        "float32 [K]: the int8 scale of each column of the weight.");
  m.def("int_grad_input", &int_grad_input, py::arg("q_grad"), py::arg("grad_scales"), py::arg("qweight"),
        py::arg("scales"), py::arg("zeros").none(true), py::arg("in_features"), py::arg("scheme"),
        py::arg("column_scales").none(true), py::arg("threads") = 1,
        "int8 [M, N] with float32 scales [M] -> float32 [M, K]; column_scales for grouped weights.");
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("peak_probes", &qk::peak_probes, "Instructions whose peak can be measured on this CPU.");
  m.def("peak", &qk::peak, py::arg("probe"), py::arg("threads"), py::arg("seconds"), NoGil(),
        "Operations per second of that instruction; a multiply-add counts as 2.");
  m.def("read_bandwidth", &qk::read_bandwidth, py::arg("bytes_per_thread"), py::arg("threads"), py::arg("seconds"),
        NoGil(), "Bytes per second that the threads together read, each from a block of its own.");
}
