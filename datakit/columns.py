"""What a table's column is. Stages declare theirs with it and the catalog makes its schema of it, so it is light: a
worker process that measures pictures does not import pyarrow for its columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pyarrow as pa

PlainType = Literal["string", "int32", "int64", "float32", "float64", "bool", "binary"]
"""Types by Arrow's names of them."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of one table.

    Attributes:
        name: unique in its table, and among all columns of the view `clips`.
        type: of its values.
        unit: empty for names and identifiers.
        meaning: half a sentence for a person who meets the column in a table.
        filled_by: a stage or the pipeline itself; `Stage` fills it in for its columns.
        good: of a score: 1 where more is better, -1 where less is, 0 where neither is.
        shown: of a score: whether the browser filters by it (numbers by a slider, strings by checkboxes) and the report
            draws it (numbers).
    """

    name: str
    type: PlainType | pa.DataType
    unit: str
    meaning: str
    filled_by: str = "ingest"
    good: Literal[-1, 0, 1] = 0
    shown: bool = True

    @property
    def arrow(self) -> pa.DataType:
        """The type of its values."""
        import pyarrow as pa

        return pa.type_for_alias(self.type) if isinstance(self.type, str) else self.type

    @property
    def is_number(self) -> bool:
        """Whether values are integers or floating-point numbers."""
        import pyarrow.types as kinds

        return kinds.is_floating(self.arrow) or kinds.is_integer(self.arrow)

    @property
    def is_whole(self) -> bool:
        """Whether values are integers."""
        import pyarrow.types as kinds

        return kinds.is_integer(self.arrow)

    @property
    def is_text(self) -> bool:
        """Whether values are strings."""
        import pyarrow.types as kinds

        return kinds.is_string(self.arrow)
