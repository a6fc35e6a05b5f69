"""The packet model: interpreters of our own rule text, which must say of a packet what `verdict(plan, packet)` says.

A rule that an interpreter does not know is an error, never skipped: so text and model cannot drift apart unseen.
"""
