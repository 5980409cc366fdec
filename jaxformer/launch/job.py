"""The description of a job: a TOML file that every launch file is made from."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from pathlib import Path
from typing import Any

from jaxformer.errors import UserError


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be trained, and on how many of which machines."""

    name: str
    config: str  # configs/wmt.py:big
    workdir: str  # on a file system that all hosts see
    flags: tuple[str, ...] = ()  # more flags of train.py
    hosts: int = 1
    processes_per_host: int = 1
    gpus_per_host: int = 0  # 0: TPU or CPU
    hours: float = 24.0
    directory: str = "."  # where the repository is on the hosts
    python: str = ".venv/bin/python"
    image: str = ""  # container with the repository, for jobset and xpk
    tpu: str = ""  # type of the slice, such as v5p-32
    tpus_per_host: int = 4  # chips, for jobset
    topology: str = ""  # of the slice, such as 2x2x4; for jobset on TPU
    zone: str = ""  # for tpu-vm and xpk
    cluster: str = ""  # for xpk
    port: int = 55527  # of process 0, for jobset

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.hosts * self.processes_per_host

    @property
    def devices(self) -> int:
        """How many devices its mesh is made of."""
        return self.hosts * (self.tpus_per_host if self.tpu else max(self.gpus_per_host, 1))

    @property
    def train_flags(self) -> tuple[str, ...]:
        """The flags of `train.py`, the same for all processes."""
        return (f"--config={self.config}", f"--workdir={self.workdir}", *self.flags)

    @classmethod
    def read(cls, path: Path) -> Job:
        """The job in a file.

        Raises:
          UserError: the file cannot be read, or a field is unknown, missing or of another type.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise UserError(f"{path} is no TOML: {error}.") from error
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1) or fields
                raise UserError(f"{path}: {name} is not known; known: {', '.join(near)}.")
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise UserError(f"{path}: {name} is missing.")
        return cls(**{name: _typed(path, name, values[name], fields[name]) for name in values})


def _typed(path: Path, name: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    wanted = str if field.default is dataclasses.MISSING else type(field.default)
    if wanted is tuple and isinstance(value, list) and all(isinstance(x, str) for x in value):
        return tuple(value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        kind = "list of strings" if wanted is tuple else wanted.__name__
        raise UserError(f"{path}: {name} is {value!r}; it must be a {kind}.")
    least: dict[str, float] = {
        "hosts": 1,
        "processes_per_host": 1,
        "gpus_per_host": 0,
        "tpus_per_host": 1,
        "hours": 0,
        "port": 1,
    }
    if name in least and float(value) < least[name]:
        raise UserError(f"{path}: {name} is {value}; it must be at least {least[name]}.")
    return value
