"""Files on disk: atomic writes, digests, manifests and runs that resume."""
