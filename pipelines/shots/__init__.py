"""Cuts and clips: shot detectors, and how a shot becomes clips."""
