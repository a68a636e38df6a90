"""What networks share: attention, compilation, fp8, LoRA, text encoders, files of weights."""
