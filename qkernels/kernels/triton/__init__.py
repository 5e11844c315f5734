"""Triton kernels for GPUs: everything `torch.ops.qkernels` computes, on the canonical storage.

`matmul_plans.py`, `training_plans.py` and `loss_plans.py` say which launches an operator is made of, `tiles.py` which
tiles they use and why; all are pure. Importing this package imports triton, so nothing outside it does so before a
tensor on a GPU arrives (`kernels/dispatch.py`).
"""
