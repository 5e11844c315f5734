// The Python module `_C_cuda`. Importing it loads the library, whose static initializers register the operators; the
// module itself says what the library was built for, which qkernels/kernels/cuda_library.py compares with what is
// there.
#include <Python.h>
#include <cuda_runtime.h>

namespace {

// 13000 for CUDA 13.0: the newest version that the driver supports; 0 without a driver.
PyObject* driver_version(PyObject*, PyObject*) {
  int version = 0;
  const cudaError_t error = cudaDriverGetVersion(&version);
  if (error != cudaSuccess) return PyErr_Format(PyExc_RuntimeError, "no driver version: %s", cudaGetErrorString(error));
  return PyLong_FromLong(version);
}

PyMethodDef methods[] = {{"driver_version", driver_version, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda(void) {
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr || PyModule_AddStringConstant(module, "targets", QKERNELS_CUDA_TARGETS) != 0 ||
      PyModule_AddIntConstant(module, "runtime_version", CUDART_VERSION) != 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
