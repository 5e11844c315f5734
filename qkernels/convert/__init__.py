"""From a float model to a quantized one and back: `quantize_`, `freeze_`, `dequantize_`, and the report."""
