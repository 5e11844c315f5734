"""The operators: their doors (`ops`), argument checks, the reference, and the choice of a backend."""
