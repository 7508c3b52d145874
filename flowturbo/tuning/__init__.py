"""The search for plans: `flowturbo tune`."""
