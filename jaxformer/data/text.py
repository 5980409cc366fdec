"""Parallel text from wherever it is: our tfds builders, any tfds dataset, or files."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jaxformer import writing
from jaxformer.config import DataConfig
from jaxformer.data.files import read_files
from jaxformer.data.pairs import Pair, ParallelText
from jaxformer.errors import UserError

__all__ = ["Pair", "ParallelText", "load"]

OWN = ("zh_en", "steve")
"""Datasets whose builders are packages of `jaxformer.data`."""

OFFLINE = "configs/steve.py and configs/tsv.py work without a network"

READ_AHEAD = 1000
"""Records fetched at a time when a split is read in order."""

log = logging.getLogger(__name__)


class RecordText(ParallelText):
    """A split of a tfds dataset, read record by record from its array_record files."""

    def __init__(self, builder: Any, split: str, keys: tuple[str, str]):
        self._records = builder.as_data_source(split)
        self._keys = keys
        self._domain = builder.name
        self.name = f"{builder.info.full_name} {split}"
        self.fingerprint = _fingerprint(builder, split, keys)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Pair:
        return self._pair(self._records[index])

    def __iter__(self) -> Iterator[Pair]:
        for start in range(0, len(self), READ_AHEAD):
            indices = range(start, min(start + READ_AHEAD, len(self)))
            yield from map(self._pair, self._records.__getitems__(list(indices)))

    def _pair(self, record: Mapping[str, bytes | str]) -> Pair:
        source, target = (_text(record[key]).strip() for key in self._keys)
        return Pair(source, target, _text(record.get("domain", "")) or self._domain)


def _text(value: bytes | str) -> str:
    """Array records hold bytes; data that tfds makes up for tests, text."""
    return value.decode() if isinstance(value, bytes) else value


def load(data: DataConfig, split: str) -> ParallelText:
    """Opens one split of the configured text; a tfds dataset is downloaded and built first.

    Args:
      data: `data.name` says what kind; `data.train`, `data.valid` and `data.test` say which split
        of a dataset, or which file.
      split: "train", "valid" or "test".

    Raises:
      UserError: it is not there, or is not what it should be: names the file, line and cure.
    """
    where = getattr(data, split)
    if not where:
        raise UserError(
            f"config.data.{split} is empty: name a "
            f"{'file' if data.name == 'files' else 'split of ' + data.name} there."
        )
    if data.name == "files":
        return read_files(where, (data.source, data.target), f"config.data.{split}")
    builder = prepared(data)
    _check_names(builder, data, where, split)
    try:
        return RecordText(builder, where, (data.source, data.target))
    except ValueError as error:  # what tfds makes of a slice that is empty or none
        raise UserError(
            f"config.data.{split}={where!r} selects nothing of {builder.name} "
            f"({_first_line(error)}); write it like train[:4000]."
        ) from error


def prepared(data: DataConfig) -> Any:
    """The builder of the dataset, with its files in place."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():  # bars that move are for terminals
        tfds.disable_progress_bar()
    if data.name in OWN:
        module = importlib.import_module(f"jaxformer.data.{data.name}.{data.name}_dataset_builder")
        builder = module.Builder(data_dir=data.data_dir)
    else:
        builder = _registered(data)
    try:
        # tfds writes into a temporary folder and renames it: a build that was killed starts again.
        builder.download_and_prepare(file_format="array_record")
    except (OSError, tfds.download.DownloadError) as error:
        if writing.disk_is_full(error):
            raise _full(data) from error
        raise UserError(
            f"config.data.name={data.name!r} cannot be downloaded ({_first_line(error)}); "
            f"{OFFLINE}."
        ) from error
    except Exception as error:
        if writing.disk_is_full(error):
            raise _full(data) from error
        if not _lacks_tensorflow(error):
            raise
        raise UserError(
            f"config.data.name={data.name!r} is not built yet, and tfds unpacks its downloads with "
            "TensorFlow only; pip install tensorflow-cpu to build it once (reading needs none), or "
            f"know that {OFFLINE}."
        ) from error
    for sentence in (*_metadata(builder, "missing"), *_metadata(builder, "warnings")):
        _warn(f"{builder.data_dir}: {sentence}")
    return builder


def _full(data: DataConfig) -> UserError:
    return UserError(
        f"config.data.data_dir={data.data_dir!r} is on a full disk; make room there, or name "
        "another folder."
    )


@functools.cache
def _warn(sentence: str) -> None:
    """Once in a process, however many splits are opened."""
    log.warning(sentence)


def _registered(data: DataConfig) -> Any:
    import tensorflow_datasets as tfds
    import tensorflow_datasets.translate

    try:
        return tfds.builder(data.name, data_dir=data.data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        registered = tfds.list_builders(with_community_datasets=False)
        dataset = data.name.partition("/")[0]
        known = [*OWN, "files", *registered]
        if dataset in registered:
            configs = tfds.builder_cls(dataset).builder_configs
            known = [dataset, *(f"{dataset}/{config}" for config in configs)]
        if data.name in known:
            raise UserError(
                f"config.data.name={data.name!r} in config.data.data_dir={data.data_dir!r} cannot "
                f"be opened ({_first_line(error)}); name another folder."
            ) from error
        near = difflib.get_close_matches(data.name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"{OFFLINE}."
        raise UserError(
            f"config.data.name={data.name!r} is not a dataset that tfds knows "
            f"({_first_line(error)}): {hint}"
        ) from error


def _check_names(builder: Any, data: DataConfig, where: str, split: str) -> None:
    splits = list(builder.info.splits)
    if splits and where.partition("[")[0] not in splits:  # tfds.testing.mock_data knows none
        raise UserError(
            f"config.data.{split}={where!r} is not a split of {builder.name}; it has "
            f"{', '.join(splits)}."
        )
    keys = list(builder.info.features)
    for field in ("source", "target"):
        if getattr(data, field) not in keys:
            raise UserError(
                f"config.data.{field}={getattr(data, field)!r} is not a language of "
                f"{builder.name}; it has {', '.join(keys)}."
            )


def _fingerprint(builder: Any, split: str, keys: tuple[str, str]) -> str:
    """Of what tfds says of the dataset: its version, its files, and how many records they hold."""
    info = builder.info
    told: dict[str, Any] = {"name": info.full_name, "split": split, "keys": keys}
    told["sizes"] = {name: info.splits[name].shard_lengths for name in info.splits}
    told["bytes"] = {name: info.splits[name].num_bytes for name in info.splits}
    told["metadata"] = dict(info.metadata) if isinstance(info.metadata, Mapping) else {}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _metadata(builder: Any, key: str) -> list[str]:
    metadata = builder.info.metadata
    found = metadata.get(key, ()) if isinstance(metadata, Mapping) else ()
    return list(found.values() if isinstance(found, Mapping) else found)


def _lacks_tensorflow(error: BaseException | None) -> bool:
    while error and getattr(error, "name", None) != "tensorflow":
        error = error.__cause__
    return error is not None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
