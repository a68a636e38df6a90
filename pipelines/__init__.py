"""What `datakit run NAME` runs: pipelines as lists of stages, and the runner that puts them on Ray."""
