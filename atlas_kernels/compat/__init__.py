"""Drop-ins: functions of other people's published training code, under their names, with our kernels inside.

One module per project: ``from atlas_kernels.compat.trades import trades_loss``. Signatures, defaults, results and side
effects are those of the published functions; starts and directions are drawn from the same global generators in the
same order, so that a seeded script sees the same adversaries up to rounding. Each docstring says what is kept and what
differs. Everywhere: attacks compute no gradient of the weights and leave ``.grad`` alone (published code often leaves
the attack's gradients there, which the script has to zero before its own), and tensors go to the device of the images
or of the model instead of to CUDA. What else a published file has stays there; asked for here, it says so.
"""
