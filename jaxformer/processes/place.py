"""Which process of how many this is: told by flags, or found out from the scheduler."""

from __future__ import annotations

import dataclasses

from jax._src import clusters

from jaxformer.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of how many this is, and where process 0 listens ("host:port")."""

    coordinator: str
    count: int
    index: int


def find_place(coordinator: str | None, count: int | None, index: int | None) -> Place | None:
    """The place that the flags name, or else the scheduler; None for a process on its own.

    SLURM, Open MPI, Kubernetes (Job and JobSet) and TPU pods are recognised by JAX's own detection.
    This asks no backend.

    Raises:
      UserError: some of the flags are given and others not, or they contradict each other.
    """
    given = {"--coordinator": coordinator, "--processes": count, "--process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return _detected()
    if coordinator is None or count is None or index is None:
        raise UserError(
            f"{' and '.join(missing)} must be given too, or none of {', '.join(given)}."
        )
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} must be from 0 to {count - 1} (--processes - 1).")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator={coordinator} must be the host and port of process 0.")
    return Place(coordinator, count, index) if count > 1 else None


def _detected() -> Place | None:
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, [], None, 60)
    address, count, index, _ = found
    if not address or count is None or index is None or count == 1:
        return None
    return Place(address, count, index)
