"""Our C++ kernels for CPUs, compiled on first use: `build.py` compiles, `operators.py` hands them to torch."""
