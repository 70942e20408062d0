"""Reports: a JSON document, the same as one HTML page, and tables as text."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import data

REPORT = Path(__file__).parents[1] / "web/report.html"
SCHEMA = 1  # version of the JSON document


def write_report(page: Path, document: dict, json_file: Path | None = None) -> None:
    """Writes a document as write_page does and, if asked, as JSON, and prints where it is."""
    document = write_page(page, document)
    if json_file:
        data.write_json(json_file, document)
    print(f"wrote {page}")


def write_page(page: Path, document: dict) -> dict:
    """Writes a document as one HTML page, and returns it with time and versions added.

    docs/monitoring.md describes the fields.
    """
    version = f"{data.VERSION}, commit {data.git_commit() or 'unknown'}, torch {torch.__version__}"
    made = {"time": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()), "Papilio": version}
    document = document | {"schema": SCHEMA, "facts": document["facts"] | made}
    text = json.dumps(document, allow_nan=False).replace("<", "\\u003c")  # no text can end the script element
    html = REPORT.read_text(encoding="utf-8").replace("{{document}}", text)
    data.atomic_write(page, lambda file: file.write(html.encode()))
    return document


def text_table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Returns a table as lines of text."""
    cells = [list(map(str, row)) for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
