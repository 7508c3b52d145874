"""Training data: latents, captions, and their encoding."""
