"""A quantized weight that is shared out among processes: its storage in shards, and products with them."""
