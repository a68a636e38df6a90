"""datakit: raw video in, a versioned Parquet catalog of scored clips out."""

__version__ = "0.1.0"
