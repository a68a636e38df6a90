"""What every training run shares: setup, the loop, checkpoints, metrics, the watchdog, launching."""
