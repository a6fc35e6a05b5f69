"""The pod network of one node: the CNI executable and the node agent."""
