"""One writer for each table that records something: runs, marks, latents, splits, tombstones, videos."""
