"""Rectified flow: noising, targets, schedules, guidance and conditioning. Pure functions, one definition for training
and sampling."""
