"""The nftables mode."""
