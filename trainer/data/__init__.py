"""From a plan to batches: the batch sampler, the readers in processes of their own, the data loader."""
