"""The only code that touches the kernel; one file a subsystem; no policy."""
