"""How good a model is: BLEU and chrF on held-out text, beside the translation-memory floor.

The scores are sacrebleu's (Post 2018, "A call for clarity in reporting BLEU scores"; Popović 2015,
"chrF") with their signatures, so that they can be compared with others.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sacrebleu.metrics import BLEU, CHRF

from jaxformer import writing
from jaxformer.data.pairs import Pair
from jaxformer.data.text import load
from jaxformer.data.translation_memory import nearest_targets
from jaxformer.errors import UserError
from jaxformer.inference.translator import Translator, check

FLOOR_PAIRS = 200_000
"""The floor remembers at most so many training pairs: beyond that it takes minutes and GiB."""

SAMPLES, SAMPLE_CHARACTERS = 10, 60
"""How many sentences are shown, and how long their source may be."""

CHARACTER_LANGUAGES = ("ja", "ko", "th", "lo", "km", "my")
"""Languages without spaces between words, for which sacrebleu's default counts no words."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Corpus scores from 0 to 100."""

    bleu: float
    chrf: float


@dataclasses.dataclass(frozen=True)
class Domain:
    """One domain of a split: how many pairs, the model, and the translation memory beside it.

    The last of several is "all" of them together.
    """

    name: str
    pairs: int
    model: Scores
    floor: Scores


@dataclasses.dataclass(frozen=True)
class Sample:
    """A held-out pair and what the model made of its source."""

    domain: str
    source: str
    reference: str
    output: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that one evaluation found, and how it was done."""

    split: str
    step: int
    beam: int
    alpha: float
    average: int
    domains: tuple[Domain, ...]
    samples: tuple[Sample, ...]
    signatures: tuple[str, ...]
    floor_pairs: int
    seconds: float
    date: str
    machine: str

    def save(self, workdir: Path) -> Path:
        """Writes `evaluation.SPLIT.json`; what was there before stays until all is written."""
        path = file_of(workdir, self.split)
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        with writing.whole(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, workdir: Path, split: str) -> Evaluation | None:
        """What `save` wrote; None if there is nothing."""
        path = file_of(workdir, split)
        if not path.exists():
            return None
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values["domains"] = tuple(
            Domain(d["name"], d["pairs"], Scores(**d["model"]), Scores(**d["floor"]))
            for d in values["domains"]
        )
        values["samples"] = tuple(Sample(**sample) for sample in values["samples"])
        values["signatures"] = tuple(values["signatures"])
        return cls(**values)


def file_of(workdir: Path, split: str) -> Path:
    """Where the evaluation of a split is kept."""
    return workdir / f"evaluation.{split}.json"


def evaluate(
    translator: Translator,
    split: str,
    *,
    beam: int | None = None,
    alpha: float | None = None,
    average: int = 1,
    console: Console | None = None,
) -> Evaluation:
    """Translates a split of the data that the model was trained on, and scores it by domain.

    Args:
      translator: the model, with its config.
      split: "valid" or "test".
      beam: as in `Translator.translate`.
      alpha: as in `Translator.translate`.
      average: how many checkpoints `translator` is the mean of, for the record.
      console: where to show progress.

    Raises:
      UserError: the split is not configured, is empty or cannot be read.
    """
    config = translator.config
    pairs = list(load(config.data, split))
    if not pairs:
        raise UserError(f"config.data.{split} holds no sentence pairs: there is nothing to score.")
    start = time.perf_counter()
    hypotheses = translator.translate(
        [pair.source for pair in pairs], beam=beam, alpha=alpha, console=console
    )
    seconds = time.perf_counter() - start
    outputs = [best[0].text for best in hypotheses]
    memory = list(itertools.islice(load(config.data, "train"), FLOOR_PAIRS))
    copied = nearest_targets(
        [pair.source for pair in pairs],
        [pair.source for pair in memory],
        [pair.target for pair in memory],
    )
    metrics = _metrics(config.data.target)
    names = dict.fromkeys(pair.domain for pair in pairs)
    groups = {name: [i for i, pair in enumerate(pairs) if pair.domain == name] for name in names}
    if len(groups) > 1:
        groups["all"] = list(range(len(pairs)))
    domains = []
    for name, chosen in groups.items():
        references = [pairs[i].target for i in chosen]
        model = score(metrics, [outputs[i] for i in chosen], references)
        floor = score(metrics, [copied[i] for i in chosen], references)
        domains.append(Domain(name, len(chosen), model, floor))
    shown = [
        Sample(pairs[i].domain, pairs[i].source, pairs[i].target, outputs[i])
        for i in sample_indices(pairs)
    ]
    return Evaluation(
        split=split,
        step=translator.step,
        beam=config.decode.beam if beam is None else beam,
        alpha=config.decode.alpha if alpha is None else alpha,
        average=average,
        domains=tuple(domains),
        samples=tuple(shown),
        signatures=tuple(str(metric.get_signature()) for metric in metrics),
        floor_pairs=len(memory),
        seconds=round(seconds, 1),
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        machine=machine(),
    )


def _metrics(language: str) -> tuple[BLEU, CHRF]:
    tokenize = "13a"
    if language.startswith("zh"):
        tokenize = "zh"
    elif language.startswith(CHARACTER_LANGUAGES):
        tokenize = "char"
    return BLEU(tokenize=tokenize), CHRF()


def score(metrics: tuple[BLEU, CHRF], outputs: Sequence[str], references: Sequence[str]) -> Scores:
    """Corpus BLEU and chrF of outputs with one reference each."""
    bleu, chrf = (m.corpus_score(list(outputs), [list(references)]).score for m in metrics)
    return Scores(round(bleu, 2), round(chrf, 2))


def sample_indices(pairs: Sequence[Pair]) -> list[int]:
    """Sentences to show: short enough to read, each domain in turn, chosen by hash, not by hand."""

    def by_hash(index: int) -> bytes:
        return hashlib.sha256(pairs[index].source.encode()).digest()

    queues = []
    for name in dict.fromkeys(pair.domain for pair in pairs):
        short = [
            i
            for i, pair in enumerate(pairs)
            if pair.domain == name and len(pair.source) <= SAMPLE_CHARACTERS
        ]
        queues.append(sorted(short, key=by_hash))
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return list(itertools.islice((i for i in turns if i is not None), SAMPLES))


def machine() -> str:
    """The device this process computes on, for people."""
    devices = jax.devices()
    name = devices[0].device_kind
    if devices[0].platform == "cpu":
        return f"{_processor()}, {_cores()} cores, JAX {jax.__version__}"
    return f"{len(devices)} x {name}, JAX {jax.__version__}"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(evaluation: Evaluation, console: Console) -> None:
    """Prints the table of scores and the sentences."""
    table = Table(
        title=f"{evaluation.split} split, step {evaluation.step:,}, beam {evaluation.beam}, "
        f"alpha {evaluation.alpha:g}",
        caption=f"{evaluation.floor_pairs:,} pairs in the translation memory\n"
        + "\n".join(evaluation.signatures),
    )
    table.add_column("domain")
    table.add_column("pairs", justify="right")
    for heading in ("BLEU", "memory", "chrF", "memory"):
        table.add_column(heading, justify="right")
    for domain in evaluation.domains:
        if domain.name == "all":
            table.add_section()
        cells: list[str | Text] = [domain.name, f"{domain.pairs:,}"]
        for ours, floor in (
            (domain.model.bleu, domain.floor.bleu),
            (domain.model.chrf, domain.floor.chrf),
        ):
            cells += [Text(f"{ours:.1f}", "bold green" if ours > floor else "red"), f"{floor:.1f}"]
        table.add_row(*cells)
    console.print(table)
    for sample in evaluation.samples:
        console.print(Text(f"\n{sample.domain}: {sample.source}", "bold"))
        console.print(Text(f"  reference  {sample.reference}"))
        console.print(Text(f"  output     {sample.output}"))


def command(arguments: argparse.Namespace) -> None:
    """`jaxformer evaluate`: scores a split, prints the table and keeps it in the workdir.

    Raises:
      UserError: flags, workdir or data that cannot be used.
    """
    check(arguments.beam, arguments.alpha, 1, None, 0)
    console = Console()
    translator = Translator.load(arguments.workdir, average=arguments.average)
    evaluation = evaluate(
        translator,
        arguments.split,
        beam=arguments.beam,
        alpha=arguments.alpha,
        average=arguments.average,
        console=Console(stderr=True),
    )
    show(evaluation, console)
    console.print(f"\nWritten to {evaluation.save(arguments.workdir)}")
