"""`qkernels` with its CUDA C++ kernels hidden, so that Triton's compute: `python tools/triton_alone.py tune ...`."""

import sys

from qkernels.cli import main
from qkernels.kernels import cuda_library

if __name__ == "__main__":
    cuda_library.library = lambda: cuda_library.Library(False, "hidden")
    sys.exit(main())
