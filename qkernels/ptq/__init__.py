"""Post-training quantization: statistics of inputs, GPTQ, SmoothQuant."""
