"""The kernels of this project on the tools beside it: its launches compiled and executed, its CUDA C++ on the host."""
