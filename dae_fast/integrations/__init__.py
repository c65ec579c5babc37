"""Other libraries' objects on fused steps; each module is imported only on request."""
