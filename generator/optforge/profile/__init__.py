"""How fast kernels are, how far from the limits of the machine, against what people use, and why."""
