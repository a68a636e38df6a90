"""Offline sampling in bulk, and judging samples by the stages that judged the footage."""
