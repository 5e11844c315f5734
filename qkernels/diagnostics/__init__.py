"""What a model would gain: `explain`."""
