"""Models by name: each is declared in a module of its own, which is found by its file name and imported when it is
asked for. So a new model is a new file, and nothing lists it. Importing this takes no torch."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from datakit.errors import ConfigError, either

if TYPE_CHECKING:
    from datakit.config import OneOf

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """Classes by name. A name has `-` where its file has `_`.

    Attributes:
        what: they are, for messages.
        package: whose modules declare one class each, with its name as the attribute `kind`.
        module: the class is in this module of the package's packages, not in the package's modules.
    """

    what: str
    package: str
    module: str | None = None

    def names(self) -> tuple[str, ...]:
        """All, sorted; none of them is imported."""
        found = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        files = [each.name for each in found if self.module is None or self._has_module(each)]
        return tuple(sorted(file.replace("_", "-") for file in files))

    def get(self, name: str) -> type[T]:
        """Raises:
        ConfigError: there is no such model.
        """
        known = self.names()
        if name not in known:
            raise ConfigError(f"there is no {self.what} {name!r}: {either(known)}")
        module = importlib.import_module(self._path(name.replace("-", "_")))
        (declared,) = (
            value
            for value in vars(module).values()
            if isinstance(value, type) and value.__module__ == module.__name__ and getattr(value, "kind", None) == name
        )
        return declared

    @property
    def choice(self) -> OneOf:
        """For the annotation of a setting: `Annotated[str, AUTOENCODERS.choice]`."""
        from datakit.config import OneOf  # pydantic: the command line lists names without it

        return OneOf(self.names)

    def _has_module(self, found: pkgutil.ModuleInfo) -> bool:
        return found.ispkg and importlib.util.find_spec(self._path(found.name)) is not None

    def _path(self, file: str) -> str:
        return ".".join(part for part in (self.package, file, self.module) if part)
