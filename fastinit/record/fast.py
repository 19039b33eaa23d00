"""Whether the fast path is in use: fastinit.record.methods decides, and what lies below that module asks here."""

in_use = False
