"""Quality against cost: metrics, FID, latency, reports."""
