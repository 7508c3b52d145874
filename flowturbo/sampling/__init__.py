"""Sampling, editing and sets of images."""
