"""The virtual machine lane: a Debian kernel with IPVS, dummy links and bridge VLAN filtering, for tests marked `vm`."""
