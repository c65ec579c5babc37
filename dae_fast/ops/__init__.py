"""The ops, one file each; `affine` and `residual` are the two primitives they are rows of."""
