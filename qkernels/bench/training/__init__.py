"""Benchmarks of training steps: the time of a step, the memory it needs, and what it computes.

cases.py        models, batches, and which gradients are wanted
contenders.py   float, ours, and other libraries: how each converts a model
run.py          interleaved timing and the results file
memory.py       resident memory of one contender, in a process of its own
"""
