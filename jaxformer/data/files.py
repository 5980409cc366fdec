"""Parallel text out of files: TSV, JSON lines, or a pair of line-aligned files."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxformer.data.pairs import Pair, ParallelText
from jaxformer.errors import UserError

MAX_CHARACTERS = 10_000
"""A longer line is no sentence: it is left out, and counted."""

BOM = b"\xef\xbb\xbf"

log = logging.getLogger(__name__)


class Lines:
    """The lines of a UTF-8 file by number; the file stays on disk."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb")
        self._bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = len(BOM) if self._bytes[: len(BOM)] == BOM else 0
        ends = _newlines(self._bytes)
        self._starts = np.concatenate([[begin], ends + 1])
        if self._starts[-1] == len(self._bytes):
            self._starts = self._starts[:-1]
        self._stops = np.concatenate([ends, [len(self._bytes)]])[: len(self._starts)]

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, number: int) -> bytes:
        """The bytes of a line, counted from 0, without its end."""
        return self._bytes[self._starts[number] : self._stops[number]].rstrip(b"\r")

    def place(self, number: int) -> str:
        """Where a line is, for people."""
        return f"{self.path}, line {number + 1}"

    def checked(self, number: int) -> str:
        """The text of a line.

        Raises:
          UserError: it is not UTF-8, or holds a NUL byte.
        """
        raw = self.raw(number)
        nul = raw.find(b"\0")
        if nul >= 0:
            raise UserError(
                f"{self.place(number)} has a NUL byte at byte {nul + 1}: this is no text file; "
                "convert it to UTF-8 text."
            )
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.place(number)} is not UTF-8 at byte {error.start + 1}; convert the file, "
                "for instance with iconv -f GB18030 -t UTF-8."
            ) from error

    def digest(self) -> str:
        """SHA-256 of the whole file."""
        return hashlib.sha256(self._bytes).hexdigest()


class FileText(ParallelText):
    """Sentence pairs of files that have been checked line by line."""

    def __init__(
        self,
        files: tuple[Lines, ...],
        keys: tuple[str, str],
        parse: Callable[[int], Pair],
        good: np.ndarray,
    ):
        self._parse, self._good = parse, good
        self.name = ", ".join(str(file.path) for file in files)
        # The same objects under other keys are another text.
        read_by = keys if files[0].path.suffix == ".jsonl" else ()
        told = json.dumps([*(file.digest() for file in files), *read_by])
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._good)

    def __getitem__(self, index: int) -> Pair:
        return self._parse(int(self._good[index]))


def read_files(where: str, keys: tuple[str, str], field: str) -> FileText:
    """Opens and checks a `.jsonl` file, a TSV file, or "sources.txt,targets.txt".

    Args:
      where: path or pair of paths.
      keys: names of source and target in a `.jsonl` object.
      field: the config field that `where` comes from.

    Raises:
      UserError: the first thing that is wrong, with file, line and cure.
    """
    paths = [Path(part) for part in where.split(",")]
    if len(paths) > 2:
        raise UserError(f"{field}={where!r} names {len(paths)} files; give one, or two by a comma.")
    files = tuple(_open(path, field) for path in paths)
    if len(files) == 2:
        _check_aligned(*files)

    def parse(number: int) -> Pair:
        lines = [file.checked(number) for file in files]
        if len(files) == 2:
            source, target, domain = lines[0].strip(), lines[1].strip(), paths[0].stem
        elif paths[0].suffix == ".jsonl":
            source, target, domain = _parse_json(lines[0], keys, files[0].place(number))
        else:
            source, target, domain = _parse_tsv(lines[0], files[0].place(number))
        _check_sides(source, target, files[0].place(number))
        return Pair(source, target, domain or paths[0].stem)

    return FileText(files, keys, parse, _good_lines(files, parse))


def _open(path: Path, field: str) -> Lines:
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} ({field}) is empty; it needs one sentence pair on each line.")
        return Lines(path)
    except OSError as error:
        raise UserError(f"{field}={str(path)!r} cannot be read: {error.strerror}.") from error


def _newlines(content: mmap.mmap) -> np.ndarray:
    return np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n"))


def _check_aligned(sources: Lines, targets: Lines) -> None:
    if len(sources) != len(targets):
        raise UserError(
            f"{sources.path} has {len(sources)} lines and {targets.path} has {len(targets)}; line "
            "n of one must be the translation of line n of the other."
        )


def _good_lines(files: tuple[Lines, ...], parse: Callable[[int], Pair]) -> np.ndarray:
    """The numbers of the lines that hold a pair; blank and endless lines are passed over."""
    good, long = [], []
    for number in range(len(files[0])):
        raw = [file.raw(number) for file in files]
        if not any(line.strip() for line in raw):
            continue
        if (
            max(map(len, raw)) > MAX_CHARACTERS
            and max(len(file.checked(number)) for file in files) > MAX_CHARACTERS
        ):
            long.append(number)
            continue
        parse(number)
        good.append(number)
    if long:
        log.warning(
            "%s: %d line(s) of more than %d characters are left out, the first is line %d.",
            files[0].path,
            len(long),
            MAX_CHARACTERS,
            long[0] + 1,
        )
    if not good:
        raise UserError(f"{files[0].path} holds no sentence pair; it needs one on each line.")
    return np.array(good, np.int64)


def _parse_tsv(line: str, place: str) -> tuple[str, str, str]:
    columns = line.split("\t")
    if len(columns) not in (2, 3):
        raise UserError(
            f"{place} has {len(columns) - 1} tabs; it must be source<TAB>target, and may have a "
            "third column with the domain."
        )
    source, target, *domain = (column.strip() for column in columns)
    return source, target, domain[0] if domain else ""


def _parse_json(line: str, keys: tuple[str, str], place: str) -> tuple[str, str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}); each line must be one object.") from error
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
        raise UserError(
            f'{place} must be an object with text under "{keys[0]}" and "{keys[1]}" (the names in '
            "config.data.source and config.data.target)."
        )
    if re.search("[\0\ud800-\udfff]", "".join(record[key] for key in keys)):
        raise UserError(
            f"{place} spells a NUL, or half a character, with \\u; correct it or remove the line."
        )
    source, target = (record[key].strip() for key in keys)
    return source, target, str(record.get("domain") or "").strip()


def _check_sides(source: str, target: str, place: str) -> None:
    for side, text in (("source", source), ("target", target)):
        if not text:
            raise UserError(f"{place} has an empty {side}; fill it in or remove the line.")
