"""The definition of every operator in plain PyTorch: slow, short, and what the kernels are checked against."""
