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


if __name__ == "__main__":
    main()
