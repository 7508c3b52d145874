"""Devices, random numbers, processes and CUDA graphs."""
