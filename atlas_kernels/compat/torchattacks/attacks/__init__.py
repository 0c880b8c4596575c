"""One attack a file, as in torchattacks."""
