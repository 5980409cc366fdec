"""`jaxformer translate`: lines in, the same number of lines out, in order."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from jaxformer import writing
from jaxformer.errors import UserError
from jaxformer.inference.decode import Sampling
from jaxformer.inference.translator import Translation, Translator, check


def translate(arguments: argparse.Namespace) -> None:
    """Reads, translates, writes; warnings about single lines go to stderr.

    Raises:
      UserError: flags that contradict each other, files or a workdir that cannot be used.
    """
    sampling = _sampling(arguments)
    check(arguments.beam, arguments.alpha, arguments.n_best, sampling, arguments.seed)
    if arguments.output is not None:
        writing.check(arguments.output, f"--output={arguments.output}")
    lines, warnings = _read(arguments.input)
    console = Console(stderr=True)
    translations: list[list[Translation]] = []
    if lines:
        translator = Translator.load(arguments.workdir, average=arguments.average)
        translations = translator.translate(
            lines,
            beam=arguments.beam,
            alpha=arguments.alpha,
            n_best=arguments.n_best,
            sampling=sampling,
            seed=arguments.seed,
            console=console,
        )
    for number, hypotheses in enumerate(translations, 1):
        if hypotheses[0].warning:
            warnings.append(f"line {number}: {hypotheses[0].warning}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    _write(arguments.output, _formatted(translations, arguments.n_best))
    if arguments.output:
        print(f"{len(lines)} lines translated, written to {arguments.output}", file=sys.stderr)


def _sampling(arguments: argparse.Namespace) -> Sampling | None:
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    if not arguments.sample:
        if sampling != Sampling():
            raise UserError("--temperature, --top_k and --top_p belong to --sample: add it.")
        return None
    for name in ("beam", "alpha"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--sample draws one translation; leave out --{name}.")
    return sampling


def _read(path: Path | None) -> tuple[list[str], list[str]]:
    """The lines, and warnings about those that had to be mended to be text."""
    try:
        content = sys.stdin.buffer.read() if path is None else path.read_bytes()
    except OSError as error:
        raise UserError(f"--input={path} cannot be read: {error.strerror}.") from error
    rows = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not rows[-1]:
        rows.pop()
    lines, warnings = [], []
    for number, raw in enumerate(rows, 1):
        text = raw.decode("utf-8", errors="replace")
        if "\0" in text:
            warnings.append(f"line {number}: a NUL byte at byte {raw.index(0) + 1} was left out")
            text = text.replace("\0", "")
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            warnings.append(f"line {number}: not UTF-8 at byte {error.start + 1}, read as �")
        lines.append(text)
    return lines, warnings


def _formatted(translations: list[list[Translation]], n_best: int) -> str:
    """A line each; with n-best `number<TAB>score<TAB>text`, the lines numbered from 1."""
    if n_best == 1:
        return "".join(f"{hypotheses[0].text}\n" for hypotheses in translations)
    return "".join(
        f"{number}\t{hypothesis.score:.4f}\t{hypothesis.text}\n"
        for number, hypotheses in enumerate(translations, 1)
        for hypothesis in hypotheses
    )


def _write(path: Path | None, text: str) -> None:
    if path is None:
        try:
            sys.stdout.buffer.write(text.encode())  # UTF-8 in, UTF-8 out
            sys.stdout.buffer.flush()
        except OSError as error:
            raise UserError(f"stdout cannot be written: {error.strerror}.") from error
        return
    with writing.whole(path, f"--output={path}") as partial:
        partial.write_text(text, encoding="utf-8")
