"""Files, directories and hub datasets as rows; a row knows where it came from, so that every complaint can name it."""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from re import fullmatch
from typing import Any, cast

from services.errors import UserError
from services.text.config import DataSection

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
JSONL_ENDINGS = (".jsonl", ".ndjson", ".json")
PARQUET_ENDINGS = (".parquet", ".pq")


@dataclass(frozen=True)
class Row:
    """`where` names the row for a message; `split` is train, validation, test or, where the source has none, None."""

    where: str
    values: dict[str, Any]
    split: str | None


def read_rows(section: DataSection) -> Iterator[Row]:
    """Rows of a file, a directory or a hub dataset, in their own order; `section.limit` rows a file or split."""
    path = Path(section.source).expanduser()
    if path.is_file():
        yield from _read_file(path, section, None)
    elif path.is_dir():
        yield from _read_directory(path, section)
    elif looks_like_a_path(section.source):
        raise UserError(f"data.source: {section.source!r} does not exist{_neighbours(path)}")
    else:
        yield from _read_hub(section)


def looks_like_a_path(source: str) -> bool:
    """A hub name is `name` or `owner/name`; everything else, and everything that ends like a data file, is a path."""
    endings = (*JSONL_ENDINGS, *PARQUET_ENDINGS)
    return source.endswith(endings) or not fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source)


def split_of_name(name: str) -> str | None:
    """train-00000-of-00002 -> train; None for a name that says no split."""
    head = name.lower().replace("_", "-").replace(".", "-").split("-")[0]
    return SPLIT_NAMES.get(head)


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor does its directory {path.parent}"
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _read_file(path: Path, section: DataSection, split: str | None) -> Iterator[Row]:
    form = section.format
    if form == "auto":
        form = _form_of(path)
        if form is None:
            allowed = ", ".join((*JSONL_ENDINGS, *PARQUET_ENDINGS))
            raise UserError(
                f"data.source: cannot tell how to read {path}: set data.format, or use an ending of {allowed}"
            )
    if form == "datasets":
        raise UserError(f"data.format: datasets reads a directory or a hub name, and {path} is a file")
    rows = _read_jsonl(path, split) if form == "jsonl" else _read_parquet(path, split)
    yield from islice(rows, section.limit)


def _form_of(path: Path) -> str | None:
    if path.name.endswith(JSONL_ENDINGS):
        return "jsonl"
    return "parquet" if path.name.endswith(PARQUET_ENDINGS) else None


def _read_jsonl(path: Path, split: str | None) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
            if not line:
                continue
            try:
                values: Any = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{where}: not valid JSON: {error}") from error
            if not isinstance(values, dict):
                raise UserError(f"{where}: expected one JSON object a line, got {type(values).__name__}")
            yield Row(where, cast(dict[str, Any], values), split)


def _read_parquet(path: Path, split: str | None) -> Iterator[Row]:
    arrow: Any = import_module("pyarrow")
    parquet: Any = import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", values, split)
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {error}") from error


def _read_directory(path: Path, section: DataSection) -> Iterator[Row]:
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if saved and section.format in ("auto", "datasets"):
        datasets: Any = import_module("datasets")
        yield from _rows_of_dataset(datasets.load_from_disk(str(path)), section)
        return
    if section.format == "datasets":
        datasets = import_module("datasets")
        yield from _rows_of_dataset(_load(datasets, str(path), section), section)
        return
    files = [
        entry
        for entry in sorted(path.rglob("*"))
        if entry.is_file()
        and _form_of(entry) in (("jsonl", "parquet") if section.format == "auto" else (section.format,))
        and not any(part.startswith(".") for part in entry.relative_to(path).parts)
    ]
    if not files:
        raise UserError(f"data.source: {path} holds no saved dataset and no .jsonl or .parquet file")
    for file in files:
        yield from _read_file(file, section, split_of_name(file.stem) or split_of_name(file.parent.name))


def _read_hub(section: DataSection) -> Iterator[Row]:
    if section.format not in ("auto", "datasets"):
        raise UserError(
            f"data.source: {section.source!r} does not exist as a file, and data.format is {section.format}"
        )
    datasets: Any = import_module("datasets")
    yield from _rows_of_dataset(_load(datasets, section.source, section), section)


def _load(datasets: Any, name: str, section: DataSection) -> Any:
    try:
        return datasets.load_dataset(name, section.subset, revision=section.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"data.source: {name!r} is no file or directory here, and the hub gave no such dataset "
            f"({type(error).__name__}: {first})"
        ) from error


def _rows_of_dataset(dataset: Any, section: DataSection) -> Iterator[Row]:
    name = section.source
    if not hasattr(dataset, "keys"):
        yield from _rows_of_split(dataset, name, None, section.limit)
        return
    splits: dict[str, Any] = dict(dataset)
    for key, part in splits.items():
        known = split_of_name(key)
        # A source with one split, whatever its name, has no split of its own to keep.
        if known is None and len(splits) > 1:
            raise UserError(
                f"data.source: {name} has a split {key!r}, which is none of {', '.join(SPLIT_NAMES)}; "
                "save the splits you want as files and name their directory"
            )
        yield from _rows_of_split(part, f"{name} [{key}]", known if len(splits) > 1 else None, section.limit)


def _rows_of_split(dataset: Sequence[dict[str, Any]], name: str, split: str | None, limit: int | None) -> Iterator[Row]:
    for number, values in enumerate(islice(iter(dataset), limit), start=1):
        yield Row(f"{name} row {number}", dict(values), split)
