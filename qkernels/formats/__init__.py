"""What a quantized weight is: schemes, storage, the rules that make integers of floats, and their checks."""
