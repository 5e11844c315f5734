"""What a model would gain: `explain`; what it lost: `compare`."""
