"""Time of layers beside the limits of this machine."""
