"""The userspace mode."""
