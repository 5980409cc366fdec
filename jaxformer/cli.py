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
    arguments.overrides = rest
    with plainly_said():
        arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxformer", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _translate_flags(commands.add_parser("translate", help="translate lines of text"))
    _evaluate_flags(commands.add_parser("evaluate", help="BLEU and chrF on held-out text"))
    explain = commands.add_parser(
        "explain",
        help="a page that shows one translation from the inside",
        description="Writes one page, one figure or JSON. Layers and heads count from 1.",
    )
    _explain_flags(explain)
    _launch_flags(commands.add_parser("launch", help="start train.py on many processes"))
    _plan_flags(commands.add_parser("plan", help="what a step takes on hardware that is not here"))
    return parser


def _translate_flags(translate: argparse.ArgumentParser) -> None:
    translate.set_defaults(run=_translate)
    translate.add_argument("--input", type=Path, help="a UTF-8 file, one sentence a line (stdin)")
    translate.add_argument("--output", type=Path, help="where the translations go (stdout)")
    translate.add_argument("--n_best", type=int, default=1, help="translations for each line")
    translate.add_argument("--sample", action="store_true", help="draw instead of searching")
    translate.add_argument("--temperature", type=float, default=1.0, help="below 1: less daring")
    translate.add_argument("--top_k", type=int, default=0, help="draw from so many tokens; 0: all")
    translate.add_argument("--top_p", type=float, default=1.0, help="draw from this share")
    translate.add_argument("--seed", type=int, default=0, help="of the draws")
    _decoding_flags(translate)


def _evaluate_flags(evaluate: argparse.ArgumentParser) -> None:
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("--split", choices=("valid", "test"), default="test")
    _decoding_flags(evaluate)


def _decoding_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workdir", type=Path, required=True, help="of the training run")
    command.add_argument("--beam", type=int, help="hypotheses kept; 1 is greedy")
    command.add_argument("--alpha", type=float, help="length penalty")
    command.add_argument("--average", type=int, default=1, help="mean of the last checkpoints")


def _explain_flags(explain: argparse.ArgumentParser) -> None:
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


def _launch_flags(launch: argparse.ArgumentParser) -> None:
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


def _plan_flags(plan: argparse.ArgumentParser) -> None:
    plan.set_defaults(run=_plan)
    plan.add_argument(
        "--config", required=True, help="configs/FILE.py:PRESET; and any --config.FIELD=VALUE"
    )
    plan.add_argument("--topology", required=True, help="v5p:2x2x4, 16*v5e:16x16, h100:4x8")
    plan.add_argument("--mesh", help="such as data=2,fsdp=8; the config's own otherwise")
    plan.add_argument("--limit", type=float, default=900.0, help="seconds for one compilation")


def _translate(arguments: argparse.Namespace) -> None:
    from jaxformer.inference import command

    command.translate(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    from jaxformer import evaluate

    evaluate.command(arguments)


def _explain(arguments: argparse.Namespace) -> None:
    from jaxformer.explain import command

    command.explain(arguments)


def _launch(arguments: argparse.Namespace) -> None:
    from jaxformer.launch import command

    command.launch(arguments)


def _plan(arguments: argparse.Namespace) -> None:
    from jaxformer.plan import command

    command.plan(arguments, arguments.overrides)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    main()
