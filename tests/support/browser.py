"""Waiting in a browser."""

from __future__ import annotations

import time

from playwright.sync_api import Page


def until(page: Page, expression: str, timeout_s: float = 30.0) -> None:
    """Wait for a JavaScript expression to hold. (Playwright's own waiting evaluates strings in the page, which a strict
    policy forbids.)"""
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"{expression} does not come true"
        page.wait_for_timeout(50)
