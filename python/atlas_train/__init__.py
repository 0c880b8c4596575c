"""A lean trainer for adversarial training: ATLAS and its baselines, on the operators of atlas_kernels."""
