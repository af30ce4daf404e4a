"""Run kernels in this process: on NumPy, in C, on a GPU; and the arrays that they run on."""
