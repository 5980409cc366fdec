"""Checkpoints: pytrees and a little JSON in, the same out, on any number of devices.

A step is one directory, `<workdir>/checkpoints/<step>`:

    params/ ema/ train/   an Orbax checkpoint each, so that a translator reads only weights
    meta.json             what the caller wants to know of the run: config, tokenizer, step
    manifest.json         shape and dtype of every array, SHA-256 of every other file

It is written as `<step>.partial` and renamed when every byte is on disk, so a directory with a bare
number is complete. What happens to it later the checksums tell: "damaged" always means that a file
is no longer what was written, never that reading failed for some other reason.

Under `jax.distributed` every process makes the same calls, on a file system that all of them see.
Process 0 hashes, renames and deletes; the step it chooses is the step of all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp  # lives in .experimental.v1 so far; this name stays

from jaxformer.errors import UserError

META, MANIFEST = "meta.json", "manifest.json"
WEIGHTS = ("params", "ema")  # entries of the state that can be read without the others

log = logging.getLogger(__name__)


class _Quiet(logging.Filter):
    """Orbax tells absl's log of every file, and of errors (with traceback) that it raises too."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno == logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


logging.getLogger("absl").addFilter(_Quiet())


class Checkpoints:
    """The checkpoints of the run that writes `workdir`; there is one such run at a time.

    What an earlier run left half-written is removed on construction.

    Args:
      workdir: the directory of the run; made if it is not there.
      keep: how many steps stay; older ones are deleted after each save.
    """

    def __init__(self, workdir: str | Path, keep: int):
        self.workdir = Path(workdir)
        self.directory = self.workdir / "checkpoints"
        self.keep = keep
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[list[int]] | None = None
        _agreed(1, self._clean)

    def steps(self) -> list[int]:
        """The complete steps, ascending."""
        return _steps(self.directory)

    def latest(self) -> int | None:
        """The last complete step, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts writing a step; returns as soon as the arrays may be donated or overwritten.

        Waits for the save before this one first. The same step again replaces it.

        Args:
          step: number of finished updates; no smaller than the last one saved.
          state: pytrees of jax.Arrays under "params", "ema" (optional) and any other names.
          meta: anything that JSON can hold.

        Raises:
          UserError: a later step is there already; or the save before this one failed, see `wait`.
        """
        self.wait()
        text = json.dumps(meta, indent=1)
        last = self.latest()
        if last is not None and last > step:
            raise UserError(
                f"{self.directory} holds step {last} of a run that got further than this one "
                f"(step {step}); train in another --workdir, or remove the later steps first."
            )
        path = self.directory / f"{step}.partial"
        with self._tidied(path):
            with _context():
                written = ocp.save_checkpointables_async(path.absolute(), _split(state))
            self._saving = self._writer.submit(self._commit, path, written, text, _arrays(state))

    def wait(self) -> None:
        """Returns when the save under way, if any, is complete on disk.

        Raises:
          UserError: the disk is full. Earlier steps are as they were.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            if jax.process_index() != 0:
                saving.result()
            _agreed(1, saving.result)

    def close(self) -> None:
        """Like `wait`, and ends the writing thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def restore(
        self, abstract_state: dict[str, Any], step: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a step back, bit for bit, laid out as `abstract_state` says.

        Args:
          abstract_state: the state with jax.ShapeDtypeStructs (with shardings) as leaves.
          step: None takes the newest undamaged one; damaged newer ones are renamed to
            `<step>.damaged`, with a warning, so that the run can write these steps again.

        Returns:
          The state, as jax.Arrays in the same tree; and the meta it was saved with.

        Raises:
          UserError: no such step, it is damaged, or its arrays are not those of `abstract_state`.
        """
        self.wait()
        path = self.directory / str(_agreed(1, lambda: self._choose(step))[0])
        _check_arrays(path, _arrays(abstract_state))
        loaded = ocp.load_checkpointables(path.absolute(), _split(abstract_state))
        return loaded.pop("train", {}) | loaded, _read(path / META)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The meta of a step; None: of the newest step whose meta is undamaged.

        Raises:
          UserError: no such step, or it is damaged.
        """
        self.wait()
        chosen = _agreed(1, lambda: _sound(self.workdir, step, 1, ())[0])[0]
        return _read(self.directory / str(chosen) / META)

    def _clean(self) -> list[int]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if ".partial" in path.suffixes or path.suffix == ".deleted":
                    shutil.rmtree(path)
        except OSError as error:
            raise UserError(
                f"{self.directory} cannot be written ({error.strerror}); choose another --workdir."
            ) from error
        return [0]

    def _choose(self, step: int | None) -> list[int]:
        chosen, damaged = _sound(self.workdir, step, 1)
        for path, reason in damaged.items():
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            message = "%s is damaged (%s): it is now %s, and training goes on from step %d."
            log.warning(message, path, reason, aside, chosen[0])
        return chosen

    def _commit(self, path: Path, written: Any, meta: str, arrays: dict[str, str]) -> list[int]:
        """Runs in the writing thread: the last files, the rename, the deletion of old steps."""
        with self._tidied(path):
            written.result()
            if jax.process_index() != 0:
                return []
            (path / META).write_text(meta, encoding="utf-8")
            files = sorted(file for file in path.rglob("*") if file.is_file())
            sums = {file.relative_to(path).as_posix(): _sha256(file) for file in files}
            manifest = json.dumps({"arrays": arrays, "sha256": sums}, indent=1)
            (path / MANIFEST).write_text(manifest, encoding="utf-8")
            _flush(*files, path / MANIFEST, path)
            final = path.with_suffix("")
            if final.exists():
                _delete(final)
            path.rename(final)
            _flush(self.directory)
            for step in self.steps()[: -self.keep]:
                _delete(self.directory / str(step))
            return [int(final.name)]

    @contextmanager
    def _tidied(self, path: Path) -> Iterator[None]:
        """Takes the unfinished files away after an error, and says what a full disk means."""
        try:
            yield
        except Exception as error:
            if jax.process_index() == 0:
                for leftover in self.directory.glob(f"{path.name}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            # TensorStore reports system errors as text only.
            full = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
            if not any(words in str(error) for words in full):
                raise
            raise UserError(
                f"{path.with_suffix('')} could not be saved, the disk is full (earlier checkpoints "
                "are intact): make room or lower config.train.keep_checkpoints, then start again."
            ) from error


def load_weights(
    workdir: str | Path, step: int | None = None, average: int = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights to translate with: the moving average if the run kept one, else the parameters.

    Reads neither optimizer state nor the mesh that wrote it; changes nothing in `workdir`.

    Args:
      workdir: the directory of a run, which may be training at this moment.
      step: None takes the newest undamaged one, with a warning if that is not the newest.
      average: uniform mean, in float64, over so many steps up to this one.

    Returns:
      A nested dict of NumPy arrays in the dtypes of training, and the meta of the newest step read.

    Raises:
      UserError: no such step, it is damaged, or there are fewer than `average`.
    """

    def choose() -> list[int]:
        chosen, damaged = _sound(workdir, step, average, WEIGHTS)
        for path, reason in damaged.items():
            log.warning("%s is damaged (%s): step %d is used.", path, reason, chosen[0])
        return chosen

    if average < 1:
        raise UserError(f"average={average} checkpoints cannot be averaged; ask for 1 or more.")
    newest, *others = (Path(workdir) / "checkpoints" / str(n) for n in _agreed(average, choose))
    weights = _load_weights(newest)
    if others:
        sums = jax.tree.map(lambda w: w.astype(np.float64), weights)
        for path in others:
            sums = jax.tree.map(lambda s, w: s + w.astype(np.float64), sums, _load_weights(path))
        weights = jax.tree.map(lambda s, w: (s / average).astype(w.dtype), sums, weights)
    return weights, _read(newest / META)


def _load_weights(path: Path) -> dict[str, Any]:
    stored = ocp.checkpointables_metadata(path.absolute()).metadata
    name = "ema" if "ema" in stored else "params"
    # A NumPy target asks for NumPy arrays; this one is a view of a single element.
    target = jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), stored[name])
    return ocp.load_checkpointables(path.absolute(), {name: target})[name]


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _sound(
    workdir: str | Path, step: int | None, count: int, trees: tuple[str, ...] | None = None
) -> tuple[list[int], dict[Path, str]]:
    """The newest `count` undamaged steps up to `step`; the damaged ones passed over, with reasons.

    `trees` names the parts to look at; None: all of them.
    """
    directory = Path(workdir) / "checkpoints"
    steps = _steps(directory)
    if not steps:
        raise UserError(
            f"{workdir} holds no checkpoint; train it first with "
            f"python train.py --config=... --workdir={workdir}"
        )
    if step is not None and step not in steps:
        raise UserError(
            f"{workdir} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}."
        )
    sound: list[int] = []
    damaged: dict[Path, str] = {}
    for candidate in reversed(steps if step is None else steps[: steps.index(step) + 1]):
        path = directory / str(candidate)
        if not (reason := _damage(path, trees)):
            sound.append(candidate)
            if len(sound) == count:
                return sound, damaged
        elif candidate == step:
            raise UserError(f"{path} is damaged ({reason}); choose another step than {step}.")
        else:
            damaged[path] = reason
    if sound:
        raise UserError(
            f"{workdir} holds {len(sound)} usable checkpoints, too few to average {count}; ask for "
            "fewer, or train with a larger config.train.keep_checkpoints."
        )
    reasons = "; ".join(f"{path}: {reason}" for path, reason in damaged.items())
    raise UserError(
        f"{workdir} holds no undamaged checkpoint ({reasons}); bring one back from a copy, or "
        f"remove {directory} to train from the beginning."
    )


def _damage(path: Path, trees: tuple[str, ...] | None) -> str:
    """Which file of the step is not what was written; "" if all are."""
    try:
        sums = _read(path / MANIFEST)["sha256"]
    except (OSError, ValueError, LookupError):
        return f"{MANIFEST} cannot be read"
    for name, digest in sums.items():
        if trees is None or "/" not in name or name.split("/")[0] in trees:
            try:
                if _sha256(path / name) != digest:
                    return f"{name} has changed since it was written"
            except OSError as error:
                return f"{name}: {error.strerror}"
    return ""


def _agreed(count: int, choose: Callable[[], list[int]]) -> list[int]:
    """What process 0 chooses, `count` steps, on every process; nobody goes on where it fails."""
    if jax.process_count() == 1:
        return choose()
    chosen: list[int] = [-1] * count
    failure: Exception = UserError("The checkpoint cannot be used or written: see process 0.")
    if jax.process_index() == 0:
        try:
            chosen = choose()
        except Exception as error:
            failure = error
    chosen = np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(chosen))).tolist()
    if chosen[0] < 0:
        raise failure
    return chosen


def _context() -> ocp.Context:
    context = ocp.Context()
    # A save that fails at once would otherwise leave a thread waiting for its directory, for the
    # twenty minutes of Orbax's timeout, and the process with it.
    context.async_options.create_directories_asynchronously = False
    saving = context.array_options.saving
    saving.use_compression = False  # a fifth less to store is not worth twice the CPU time
    # Splitting the writing of replicated arrays pays only where the writers are different hosts.
    saving.use_replica_parallel = jax.process_count() > 1
    return context


def _split(state: dict[str, Any]) -> dict[str, Any]:
    weights = {name: tree for name, tree in state.items() if name in WEIGHTS}
    train = {name: tree for name, tree in state.items() if name not in WEIGHTS}
    return weights | ({"train": train} if train else {})


def _arrays(state: dict[str, Any]) -> dict[str, str]:
    """{"['params']['w']": "float32[512,8]"} for every leaf, concrete or abstract."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _check_arrays(path: Path, wanted: dict[str, str]) -> None:
    stored = _read(path / MANIFEST)["arrays"]
    for name in [*wanted, *stored]:
        there, here = stored.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            raise UserError(
                f"{path} was written with another config: state{name} is {there} there and {here} "
                f"here; put config.model and config.optimizer back (see {path / META}), or use "
                "another --workdir."
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _flush(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _delete(path: Path) -> None:
    """Renames first: a deletion that is cut short must not leave a step that looks complete."""
    doomed = path.with_suffix(".deleted")
    path.rename(doomed)
    shutil.rmtree(doomed)
