"""The command `jaxformer`: each subcommand reads its flags and calls one function."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxformer.errors import plainly_said


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand; a user's mistake ends in one sentence and exit code 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.run is not _plan:  # which takes --config.FIELD=VALUE too
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    with plainly_said():
        arguments.run(arguments, *([rest] if arguments.run is _plan else []))


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

    plan = commands.add_parser("plan", help="what a step takes on hardware that is not here")
    plan.set_defaults(run=_plan)
    plan.add_argument(
        "--config", required=True, help="configs/FILE.py:PRESET; and any --config.FIELD=VALUE"
    )
    plan.add_argument("--topology", required=True, help="v5p:2x2x4, 16*v5e:16x16, h100:4x8")
    plan.add_argument("--mesh", help="such as data=2,fsdp=8; the config's own otherwise")
    plan.add_argument("--limit", type=float, default=900.0, help="seconds for one compilation")
    return parser


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from jaxformer.plan import command

    command.plan(arguments, overrides)


def _translate(arguments: argparse.Namespace) -> None:
    from jaxformer.inference import command

    command.translate(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    from jaxformer import evaluate

    evaluate.command(arguments)


if __name__ == "__main__":
    main()
