"""The version: apart from the package page, which imports from everywhere."""

__version__ = "0.1.0"
