// What _C_cuda takes from libtorch_cuda.so, to link against where torch is built for the CPU and has no such library.
// At run time the dynamic loader finds torch's own under the same name; this one is never installed.
int aoti_torch_get_current_cuda_stream(int device_index, void** stream) {
  (void)device_index;
  (void)stream;
  return 1;
}
