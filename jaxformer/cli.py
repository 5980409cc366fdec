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

    launch = commands.add_parser("launch", help="start train.py on many processes")
    launch.set_defaults(run=_launch)
    what = launch.add_mutually_exclusive_group(required=True)
    what.add_argument("--local", type=_positive, metavar="N", help="N processes on this machine")
    what.add_argument(
        "--render", choices=("slurm", "jobset", "tpu-vm", "xpk"), help="write a launch file"
    )
    what.add_argument(
        "--rehearse",
        type=_positive,
        nargs="?",
        const=2,
        metavar="N",
        help="the job on N CPU processes, with a shrunken model",
    )
    launch.add_argument("--job", type=Path, help="a description of the job (TOML)")
    launch.add_argument(
        "--devices",
        type=_positive,
        help="CPU devices of each process (--local), or of all (--rehearse)",
    )
    launch.add_argument("--output", type=Path, help="the launch file (NAME.sbatch, .yaml, .sh)")
    launch.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of train.py")

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


def _launch(arguments: argparse.Namespace) -> None:
    from jaxformer.launch import command

    command.launch(arguments)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    main()
