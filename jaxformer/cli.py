"""The command `jaxformer`: each subcommand reads its flags and calls one function."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxformer.errors import plainly_said


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand; a user's mistake ends in one sentence and exit code 2."""
    arguments = _parser().parse_args(argv)
    with plainly_said():
        arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxformer", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    translate = commands.add_parser("translate", help="translate lines of text")
    translate.set_defaults(run=_translate)
    translate.add_argument("--input", type=Path, help="a UTF-8 file, one sentence a line (stdin)")
    translate.add_argument("--output", type=Path, help="where the translations go (stdout)")
    translate.add_argument("--n_best", type=int, default=1, help="translations for each line")
    translate.add_argument("--sample", action="store_true", help="draw instead of searching")
    translate.add_argument("--temperature", type=float, default=1.0, help="below 1: less daring")
    translate.add_argument("--top_k", type=int, default=0, help="draw from so many tokens; 0: all")
    translate.add_argument("--top_p", type=float, default=1.0, help="draw from this share")
    translate.add_argument("--seed", type=int, default=0, help="of the draws")

    evaluate = commands.add_parser("evaluate", help="BLEU and chrF on held-out text")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("--split", choices=("valid", "test"), default="test")

    explain = commands.add_parser(
        "explain",
        help="a page that shows one translation from the inside",
        description="Writes one page, one figure or JSON. Layers and heads count from 1.",
    )
    explain.set_defaults(run=_explain)
    explain.add_argument("sentence", nargs="?", help="of at most 64 tokens")
    explain.add_argument("--workdir", type=Path, required=True, help="of the training run")
    explain.add_argument("--output", "-o", type=Path, help="page.html; or .png, .svg, .json")
    explain.add_argument("--json", action="store_true", help="all numbers, for programs")
    explain.add_argument("--figure", help="only this one, as .png or .svg: cross_attention, ...")
    explain.add_argument(
        "--stack", choices=("encoder", "decoder", "cross"), default="cross", help="of the figure"
    )
    explain.add_argument("--layer", type=int, help="of the figure (the last)")
    explain.add_argument("--head", type=int, help="of the figure (the mean of all)")
    explain.add_argument("--step", type=int, default=1, help="output step of the figure")
    explain.add_argument(
        "--ablate",
        action="append",
        default=[],
        metavar="head=3.5",
        help="beside it the run without head 5 of layer 3: head= of the cross-attention, "
        "encoder= or decoder= of self-attention; may be repeated",
    )
    for part, what in (
        ("positions", "no token knows its place"),
        ("causal-mask", "the decoder sees what it is to predict"),
        ("pad-mask", "PAD is attended to"),
    ):
        name = part.replace("-", "_")
        explain.add_argument(f"--no-{part}", dest=name, action="store_false", help=what)
    explain.add_argument(
        "--alignments",
        action="store_true",
        help="no sentence: word alignments of the test split against gold ones, and their picture",
    )

    for command in (translate, evaluate):
        command.add_argument("--workdir", type=Path, required=True, help="of the training run")
        command.add_argument("--beam", type=int, help="hypotheses kept; 1 is greedy")
        command.add_argument("--alpha", type=float, help="length penalty")
        command.add_argument("--average", type=int, default=1, help="mean of the last checkpoints")
    return parser


def _translate(arguments: argparse.Namespace) -> None:
    from jaxformer.inference import command

    command.translate(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    from jaxformer import evaluate

    evaluate.command(arguments)


def _explain(arguments: argparse.Namespace) -> None:
    from jaxformer.explain import command

    command.explain(arguments)


if __name__ == "__main__":
    main()
