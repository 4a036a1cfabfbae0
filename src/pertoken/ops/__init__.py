"""Hot kernels, each defined by a naive twin."""
