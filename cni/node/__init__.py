"""The node agent `pynetd`: routes to the other nodes, and the socket that serves the executable."""
