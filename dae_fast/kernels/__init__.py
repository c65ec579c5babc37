"""What runs an op: csrc's kernels (native), Triton's, and plain torch (reference); dispatch chooses."""
