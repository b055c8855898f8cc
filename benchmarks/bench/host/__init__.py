"""Time on the host: what Python and PyTorch spend around a kernel."""
