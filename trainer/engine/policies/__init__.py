"""One module for each architecture that tensor and sequence parallelism can split."""
