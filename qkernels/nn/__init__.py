"""The layers: `QuantLinear`, `QuantEmbedding`, and the fused head and loss."""
