"""What to say when files of a catalog are missing or torn: which, and the snapshot to go back to."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Iterator

if TYPE_CHECKING:
    from catalogs.tables import Catalog


@contextmanager
def explained(catalog: Catalog) -> Iterator[None]:
    """Around what reads: see `Catalog.reading`."""
    yield
