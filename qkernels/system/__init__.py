"""What depends on the operating system: the heap, and where files are kept."""
