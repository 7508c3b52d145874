"""Training data: latents, encoded prompts, and the encoding of images into them."""
