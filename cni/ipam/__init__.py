"""Which address a pod gets: a pure allocator and an embedded store."""
