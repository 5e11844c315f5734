"""Quantized weights: schemes, storage, the rules that make integers of floats, and their checks."""
