"""Files on disk: whole or not at all, with digests, resumable."""
