"""A cluster on one machine: nodes are network namespaces, pods wired by pynet-cni, Services served by pyproxy."""
