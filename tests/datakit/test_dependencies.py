"""A library that is missing is one line with the extra that brings it."""

import pytest

from datakit.dependencies import require
from datakit.errors import MissingDependency


def test_what_is_missing_is_named_with_its_extra():
    require("this", "none", "json", "numpy")
    with pytest.raises(
        MissingDependency, match=r"^training needs no_such_library, nor_this: uv sync --inexact --extra train$"
    ):
        require("training", "train", "json", "no_such_library", "nor_this")
