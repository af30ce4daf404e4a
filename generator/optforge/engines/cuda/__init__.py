"""The CUDA target in this process: nvcc, the device, steps on it."""
