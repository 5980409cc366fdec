"""`jaxformer explain`: a translation as a page, a figure or JSON; alignments and their error."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from jaxformer import writing
from jaxformer.errors import UserError
from jaxformer.explain.ablation import Ablation, layers_of, parse, place
from jaxformer.inference.translator import Translator


def explain(arguments: argparse.Namespace) -> None:
    """Does what the flags ask for; the result goes to `--output`, and stderr says what is there.

    Raises:
      UserError: flags that contradict each other or name what is not there, a sentence that cannot
        be shown, files that cannot be read or written.
    """
    _check(arguments)
    console = Console(stderr=True)
    translator = Translator.load(arguments.workdir)
    if arguments.alignments:
        _alignments(translator, arguments.output, console)
        return
    config = translator.config.model
    heads = parse(config, arguments.ablate)
    place(config, arguments.stack, arguments.layer, arguments.head)
    if arguments.layer is not None and arguments.figure == "cross_attention":
        place(config, "cross", arguments.layer, arguments.head)
    ablation = Ablation(heads, arguments.positions, arguments.causal_mask, arguments.pad_mask)
    from jaxformer.explain.walk import walk

    with console.status("Compiling and running the model"):
        told = walk(translator, arguments.sentence, ablation)
    if arguments.json:
        from jaxformer.explain.page import as_json

        text = as_json(told)
        if arguments.output is None:
            print(text)
            return
        _write(arguments.output, text.encode())
    elif arguments.figure:
        _figure(told, arguments, layers_of(config, arguments.stack), console)
    else:
        from jaxformer.explain.page import render

        _write(arguments.output, render(told).encode())
    for run in told["runs"]:
        without = " ".join(["", *run["without"]])
        console.print(f"{told['sentence']} → {run['translation']}{without}", highlight=False)
    console.print(f"written to {arguments.output}", highlight=False)


def _check(arguments: argparse.Namespace) -> None:
    """Before the work: what cannot be asked for, and what could not be written."""
    if arguments.alignments == (arguments.sentence is not None):
        raise UserError("Give a sentence to explain, or --alignments to score a whole split.")
    if arguments.json and (arguments.figure or arguments.alignments):
        raise UserError("--json is the whole walk; leave out --figure and --alignments.")
    output = arguments.output
    if output is None:
        if arguments.json:
            return
        raise UserError("Name the file to write: -o page.html, or -o figure.png with --figure.")
    if (arguments.figure or arguments.alignments) and output.suffix not in (".png", ".svg"):
        raise UserError(f"--output={output} is a picture; let it end in .png or .svg.")
    writing.check(output, f"--output={output}")


def _figure(told: dict, arguments: argparse.Namespace, layers: int, console: Console) -> None:
    from jaxformer.explain.figures import FIGURES, View, draw

    if arguments.figure not in FIGURES:
        raise UserError(f"There is no figure {arguments.figure!r}; known: {', '.join(FIGURES)}.")
    steps = len(told["target"]["ids"])
    if not 1 <= arguments.step <= steps:
        raise UserError(f"There is no step {arguments.step}; the translation has 1 to {steps}.")
    view = View(
        arguments.stack,
        (arguments.layer or layers) - 1,
        None if arguments.head is None else arguments.head - 1,
        arguments.step - 1,
    )
    _save(draw(told, arguments.figure, view), arguments.output, console)


def _alignments(translator: Translator, output: Path, console: Console) -> None:
    """Chooses the read-out on the validation split, scores it on the test split, draws examples."""
    from jaxformer.explain import alignment

    data = translator.config.data
    with console.status("Reading alignments from cross-attention"):
        valid, test = (alignment.gold(data, split) for split in ("valid", "test"))
        readout = alignment.best_readout(
            alignment.word_votes(translator, valid), [one.links for one in valid]
        )
        votes = alignment.word_votes(translator, test)
    found = [alignment.links(one, readout) for one in votes]
    rate = alignment.error_rate(found, [one.links for one in test])
    _save(alignment.picture(test, votes, found, readout), output, console)
    report = {"aer": round(rate, 4), "sentences": len(test), "readout": readout.told()}
    print(json.dumps(report))
    console.print(f"alignment error rate {rate:.3f} on {len(test)} sentences; written to {output}")


def _save(figure, path: Path, console: Console) -> None:
    from jaxformer.explain.figures import save

    with writing.whole(path, f"--output={path}") as partial:
        warning = save(figure, path, partial)
    if warning:
        console.print(f"warning: {warning}", style="yellow", highlight=False)


def _write(path: Path, content: bytes) -> None:
    with writing.whole(path, f"--output={path}") as partial:
        partial.write_bytes(content)
