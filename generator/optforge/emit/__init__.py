"""From a kernel to files: C, CUDA, projects and packages."""
