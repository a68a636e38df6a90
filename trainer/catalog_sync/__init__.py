"""From a training run back to the catalog: the run's record, losses of clips, clips that were forgotten meanwhile."""
