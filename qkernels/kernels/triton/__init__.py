"""Triton kernels for GPUs: everything `torch.ops.qkernels` computes, on the canonical storage.

`plans` says which launches an operator is made of, `configs` which tiles they use and why; both are pure. Importing
this package imports triton, so nothing outside it does so before a tensor on a GPU arrives (`qkernels/dispatch.py`).
"""
