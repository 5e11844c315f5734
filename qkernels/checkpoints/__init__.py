"""Checkpoints of other libraries and engines: their tensors to and from the canonical storage, one file a format.

Everything here is a function of tensors and of what a file says about them: no model is built, and what is read, or
written, is in memory one tensor at a time. `registry.py` finds the format of a path.
"""
