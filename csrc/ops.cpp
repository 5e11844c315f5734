#include <torch/csrc/stable/library.h>
#include <Python.h>
STABLE_TORCH_LIBRARY(qkernels, m) {
  m.def("quantize_activation(Tensor x, str scheme) -> (Tensor, Tensor)");
  m.def("dequantize_weight(Tensor qweight, Tensor scales, Tensor? zeros, int in_features, str scheme) -> Tensor");
  m.def("linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, str scheme, ScalarType? out_dtype=None) -> Tensor");
  m.def("linear_grad_input(Tensor grad_out, Tensor qweight, Tensor scales, Tensor? zeros, int in_features, str scheme, ScalarType? out_dtype=None) -> Tensor");
}
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
