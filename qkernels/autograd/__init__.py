"""Gradients through the operators, and the tensors that stand for a quantized weight."""
