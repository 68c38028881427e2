"""CSV tables of cases, one row a case."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medmom.data.files import is_image, stem
from medmom.errors import MedmomError

NAME_COLUMNS = ("file", "name", "case")


@dataclass(frozen=True)
class Table:
    """A CSV file in memory.

    Attributes:
        path: The file.
        columns: Its header.
        rows: One dictionary a row, from column to text without surrounding blanks.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]

    def by_case(self) -> dict[str, Mapping[str, str]]:
        """Gives the rows by the case that ``file``, ``name`` or ``case`` names, with and without file suffix.

        Raises:
            MedmomError: There is no such column, or two rows name one case.
        """
        column = next((name for name in NAME_COLUMNS if name in self.columns), None)
        if column is None:
            raise MedmomError(
                f"{self.path}: none of the columns {', '.join(self.columns)} names the case. Add a column 'file'."
            )
        rows: dict[str, Mapping[str, str]] = {}
        for row in self.rows:
            file = Path(row[column]).name
            # A name such as "scan.2" has no suffix to take off.
            for key in {file, stem(file) if is_image(file) else file} - {""}:
                if key in rows:
                    raise MedmomError(f"{self.path}: two rows name the case {row[column]}. Keep one.")
                rows[key] = row
        return rows


def read_table(path: Path) -> Table:
    """Reads a CSV file with a header; commas, semicolons or tabs part the columns.

    Raises:
        MedmomError: The file cannot be read, has no header, or a row has more cells than the header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            text = stream.readline()
            delimiter = max(",;\t", key=text.count)
            stream.seek(0)
            lines = list(csv.reader(stream, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise MedmomError(f"{path}: not a CSV file ({error}). Save it as CSV in UTF-8.") from error
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    columns = tuple(cell.strip() for cell in lines[0]) if lines else ()
    if not any(columns) or len(set(columns)) < len(columns):
        raise MedmomError(f"{path}: the first line {list(columns)} is no header. Give each column a name of its own.")
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) > len(columns):
            raise MedmomError(
                f"{path}: line {number} has {len(cells)} cells for {len(columns)} columns. Quote the commas."
            )
        if any(cell.strip() for cell in cells):
            padded = [*cells, *[""] * (len(columns) - len(cells))]
            rows.append({column: cell.strip() for column, cell in zip(columns, padded, strict=True)})
    return Table(path, columns, tuple(rows))
