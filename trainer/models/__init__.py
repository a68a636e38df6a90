"""Networks in plain PyTorch; no parallelism in them."""
