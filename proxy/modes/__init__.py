"""The ways to program the kernel: each translates a `Plan`, and decides nothing."""
