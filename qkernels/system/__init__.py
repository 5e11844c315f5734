"""Facts about the machine and its operating system: the heap, and where files are kept."""
