"""How iptables rules say "source equals destination", which no match of theirs does: a classic BPF program. Pure."""

from proxy.plan import Family

# words of the IP header: 12 and 16; in IPv6 8… and 24…
SAME_ADDRESS = {
    Family.V4: "6,32 0 0 12,7 0 0 0,32 0 0 16,29 0 1 0,6 0 0 65535,6 0 0 0",
    Family.V6: "18," + ",".join(f"32 0 0 {8 + w},7 0 0 0,32 0 0 {24 + w},29 0 {13 - w} 0" for w in (0, 4, 8, 12))
    + ",6 0 0 65535,6 0 0 0",
}  # fmt: skip
