"""The machine: devices, random numbers, processes, CUDA graphs."""
