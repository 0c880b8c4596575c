"""Robust accuracy: attacks by name, the images, what was measured, and the signs that a figure cannot be trusted."""
