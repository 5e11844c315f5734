"""Runs GPU code without a GPU: a PTX interpreter, an emulator of CUDA C++ on the host, and readers of machine code."""
