"""Networks in plain PyTorch without parallelism: a folder a family, and what they share."""
