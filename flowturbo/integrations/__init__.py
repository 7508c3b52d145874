"""Plans, refiners and fused kernels inside diffusers pipelines."""
