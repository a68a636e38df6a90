"""The MMDiT of Open-Sora 2.0 and Flux: the network, its layouts, its files, its FLOPs."""
