"""The IPVS mode."""
