"""Clip files of exports, and the child processes that cut and measure them."""
