"""Benchmarks of one linear layer: what the CPU can do at most, what we reach of it, and what others reach.

roofline.py    peaks and bandwidths of this CPU, and the least time a product can take on it
shapes.py      layers of real models
candidate.py   what every implementation that is timed has in common
ours.py, torch_baselines.py, peers.py, ggml.py    the implementations
timing.py      interleaved timing, warm and cold
suite.py       one run: prepare, verify, time, compare with the limit
results.py, compare.py, plots.py    JSON and CSV, two runs side by side, pictures
"""
