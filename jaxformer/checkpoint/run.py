"""Writing and restoring the checkpoints of a run."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp  # lives in .experimental.v1 so far; this name stays

from jaxformer import processes, writing
from jaxformer.checkpoint.files import (
    MANIFEST,
    META,
    SEAL,
    complete_steps,
    delete,
    flush,
    read_json,
    sealing,
    sha256,
    sound_steps,
)
from jaxformer.errors import UserError

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
      keep_best: how many of those with the lowest score stay besides.
    """

    def __init__(self, workdir: str | Path, keep: int, keep_best: int = 0):
        self.workdir = Path(workdir)
        self.directory = self.workdir / "checkpoints"
        self.keep, self.keep_best = keep, keep_best
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[list[int]] | None = None
        processes.shared(self._clean)

    def steps(self) -> list[int]:
        """The complete steps, ascending."""
        return complete_steps(self.directory)

    def latest(self) -> int | None:
        """The last complete step, or None."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: dict[str, Any], meta: dict[str, Any], score: float | None = None
    ) -> None:
        """Starts writing a step; returns as soon as the arrays may be donated or overwritten.

        Waits for the save before this one first. The same step again replaces it.

        Args:
          step: number of finished updates; no smaller than the last one saved.
          state: pytrees of jax.Arrays under "params", "ema" (optional) and any other names.
          meta: anything that JSON can hold.
          score: what `keep_best` compares, lower is better; None: never among the best.

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
            self._saving = self._writer.submit(
                self._commit, path, written, text, _arrays(state), score
            )

    def wait(self) -> None:
        """Returns when the save under way, if any, is complete on disk.

        Raises:
          UserError: the disk is full. Earlier steps are as they were.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            if processes.index() != 0:
                saving.result()
            processes.shared(saving.result)

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
        path = self.directory / str(processes.shared(lambda: self._choose(step))[0])
        _check_arrays(path, _arrays(abstract_state))
        loaded = ocp.load_checkpointables(path.absolute(), _split(abstract_state))
        return loaded.pop("train", {}) | loaded, read_json(path / META)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The meta of a step; None: of the newest step whose meta is undamaged.

        Raises:
          UserError: no such step, or it is damaged.
        """
        self.wait()
        chosen = processes.shared(lambda: sound_steps(self.workdir, step, 1, ())[0])[0]
        return read_json(self.directory / str(chosen) / META)

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
        chosen, damaged = sound_steps(self.workdir, step, 1)
        for path, reason in damaged.items():
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            message = "%s is damaged (%s): it is now %s, and training goes on from step %d."
            log.warning(message, path, reason, aside, chosen[0])
        return chosen

    def _commit(
        self, path: Path, written: Any, meta: str, arrays: dict[str, str], score: float | None
    ) -> list[int]:
        """Runs in the writing thread: the last files, the rename, the deletion of old steps."""
        with self._tidied(path):
            written.result()
            if processes.index() != 0:
                return []
            (path / META).write_text(meta, encoding="utf-8")
            files = sorted(file for file in path.rglob("*") if file.is_file())
            sums = {file.relative_to(path).as_posix(): sha256(file) for file in files}
            manifest = json.dumps({"score": score, "arrays": arrays, "sha256": sums}, indent=1)
            (path / MANIFEST).write_text(manifest, encoding="utf-8")
            (path / SEAL).write_text(sealing(path), encoding="utf-8")
            flush(*files, path / MANIFEST, path / SEAL, path)
            final = path.with_suffix("")
            if final.exists():
                delete(final)
            path.rename(final)
            flush(self.directory)
            self._delete_old()
            return [int(final.name)]

    def _delete_old(self) -> None:
        old = self.steps()[: -self.keep]
        scores = {step: self._score(step) for step in self.steps()} if self.keep_best else {}
        ranked = sorted((score, -step) for step, score in scores.items() if score is not None)
        best = {-step for _, step in ranked[: self.keep_best]}
        for step in old:
            if step not in best:
                delete(self.directory / str(step))

    def _score(self, step: int) -> float | None:
        try:
            return read_json(self.directory / str(step) / MANIFEST).get("score")
        except (OSError, ValueError):
            return None  # damaged: restoring will say so

    @contextmanager
    def _tidied(self, path: Path) -> Iterator[None]:
        """Takes the unfinished files away after an error, and says what a full disk means."""
        try:
            yield
        except Exception as error:
            if processes.index() == 0:
                for leftover in self.directory.glob(f"{path.name}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            if not writing.disk_is_full(error):
                raise
            raise UserError(
                f"{path.with_suffix('')} could not be saved, the disk is full (earlier checkpoints "
                "are intact): make room or lower config.train.keep_checkpoints, then start again."
            ) from error


def _context() -> ocp.Context:
    context = ocp.Context()
    # A save that fails at once would otherwise leave a thread waiting for its directory, for the
    # twenty minutes of Orbax's timeout, and the process with it.
    context.async_options.create_directories_asynchronously = False
    saving = context.array_options.saving
    saving.use_compression = False  # a fifth less to store is not worth twice the CPU time
    # Splitting the writing of replicated arrays pays only where the writers are different hosts.
    saving.use_replica_parallel = processes.count() > 1
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
    stored = read_json(path / MANIFEST)["arrays"]
    for name in [*wanted, *stored]:
        there, here = stored.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            raise UserError(
                f"{path} was written with another config: state{name} is {there} there and {here} "
                f"here; put config.model and config.optimizer back (see {path / META}), or use "
                "another --workdir."
            )
