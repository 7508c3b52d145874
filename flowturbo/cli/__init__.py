"""The command `flowturbo`."""
