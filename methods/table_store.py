"""Tables of models as files: shipped ones and those made here, found by model or by their hash."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TableStore(ABC, Generic[T]):
    """The tables of one kind that this process can use. Files are read once.

    A file is named by its model, so a folder holds one of each model.
    """

    kind: str  # for messages
    suffix: str
    error: type[ValueError]  # raised for a file that is damaged, missing, or another model's

    def __init__(self, folders: Iterable[Path] = ()) -> None:
        """Look into ``folders``, later ones first."""
        self._folders = list(folders)
        self._loaded: dict[str, T] = {}

    @abstractmethod
    def load(self, path: Path) -> T:
        """Return the tables in a file, or raise ``error``."""

    @abstractmethod
    def id_of(self, tables: T) -> str:
        """Return the hash of all numbers, in hex."""

    @abstractmethod
    def model_of(self, tables: T) -> bytes:
        """Return the id of the model that they are of."""

    def add_folder(self, folder: Path) -> None:
        """Look into ``folder`` too."""
        if folder not in self._folders:
            self._folders.append(folder)

    def add(self, tables: T) -> None:
        """Make tables known that are in no folder; they are preferred from now on."""
        self._loaded.pop(self.id_of(tables), None)
        self._loaded[self.id_of(tables)] = tables

    def of_model(self, model_id: bytes) -> T | None:
        """Return the newest known tables of a model, or None.

        Raises:
            ValueError: Of the kind ``error``; the file is damaged, or another model's.
        """
        for tables in reversed(self._loaded.values()):
            if self.model_of(tables) == model_id:
                return tables
        for folder in reversed(self._folders):
            path = folder / f"{model_id.hex()}{self.suffix}"
            if path.is_file():
                tables = self.load(path)
                if self.model_of(tables) != model_id:
                    raise self.error(f"{path} holds the {self.kind} of another model")
                self.add(tables)
                return tables
        return None

    def by_id(self, table_id: str) -> T:
        """Return the tables of this hash. A damaged file is logged and left out.

        Raises:
            ValueError: Of the kind ``error``; none of the known folders has them.
        """
        if table_id not in self._loaded:
            for folder in reversed(self._folders):
                for path in sorted(folder.glob(f"*{self.suffix}")):
                    self._load(path)
        if table_id not in self._loaded:
            raise self.error(
                f"no {self.kind} {table_id} here: copy its file to this machine's folder"
            )
        return self._loaded[table_id]

    def _load(self, path: Path) -> None:
        """Make the tables in a file known, but not preferred."""
        try:
            tables = self.load(path)
        except self.error as error:
            logger.warning("left out: %s", error)  # which names the file
            return
        if self.id_of(tables) not in self._loaded:
            self._loaded = {self.id_of(tables): tables} | self._loaded
