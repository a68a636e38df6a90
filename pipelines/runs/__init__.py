"""What `datakit run` runs: ingest, score, caption, caption_match, dedup, clip files."""
