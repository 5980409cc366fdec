"""The last word of a run: scores on held-out text, and one self-contained page, `report.html`."""

from __future__ import annotations

import io
import statistics
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from matplotlib.figure import Figure
from rich.console import Console

from jaxformer import evaluate, writing
from jaxformer.config import Config
from jaxformer.errors import plainly_said
from jaxformer.evaluate import Evaluation
from jaxformer.inference.translator import Translator
from jaxformer.metrics import read_log

BLUE, ORANGE, GREY = "#2a78c2", "#d9662b", "#8a8f98"
"""Readable on white and on black."""

Records = Sequence[dict[str, float]]


def finish(workdir: Path, console: Console) -> None:
    """Scores the newest checkpoint on the test split (else the validation split), and reports.

    What was scored before at this step is not scored again.
    """
    translator = Translator.load(workdir)
    config = translator.config
    split = "test" if config.data.test else "valid"
    evaluation = None
    if getattr(config.data, split):
        evaluation = Evaluation.read(workdir, split)
        if evaluation is None or evaluation.step != translator.step:
            evaluation = evaluate.evaluate(translator, split, console=console)
            evaluation.save(workdir)
        evaluate.show(evaluation, console)
    console.print(f"\nThe report is {write(workdir, config, evaluation)}")


def write(workdir: Path, config: Config, evaluation: Evaluation | None) -> Path:
    """Writes `report.html`: what was trained, the curves, the scores and the sentences.

    Raises:
      UserError: the file cannot be written.
    """
    records = read_log(workdir)
    template = resources.files("jaxformer").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template).render(
        name=workdir.resolve().name,
        facts=facts(records, config),
        curves=_svg(curves(records)) if records else "",
        evaluation=evaluation,
        config=config.to_json(),
    )
    path = workdir / "report.html"
    with writing.whole(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def facts(records: Records, config: Config) -> list[tuple[str, str]]:
    """(what, how much) of a run, for its head."""
    model = config.model
    found = [
        ("data 数据", f"{config.data.name}, {config.data.source} → {config.data.target}"),
        (
            "model 模型",
            f"{model.encoder_layers} + {model.decoder_layers} layers, d_model {model.d_model}, "
            f"{model.num_heads} heads, d_ff {model.d_ff}",
        ),
    ]
    steps = [record for record in records if "loss" in record]
    if steps:
        seconds = sum(record["seconds"] for record in steps)
        speed = statistics.median(record["tokens_per_second"] for record in steps)
        share = statistics.median(record["share_of_peak"] for record in steps)
        found += [
            ("steps 步数", f"{steps[-1]['step']:,.0f}"),
            ("time in steps 训练用时", f"{seconds / 60:.1f} min"),
            ("speed 速度", f"{speed:,.0f} target tokens/s, {share:.0%} of the matmul peak"),
        ]
    held_out = [record for record in records if "valid_nll" in record]
    if held_out:
        last = held_out[-1]
        found.append(
            (
                "validation 验证",
                f"{last['valid_nll']:.3f} nats per token, "
                f"{last['valid_accuracy']:.1%} of next tokens right",
            )
        )
    return found


def curves(records: Records) -> Figure:
    """Loss, learning rate and speed over the steps."""
    steps = [record for record in records if "loss" in record]
    held_out = [record for record in records if "valid_nll" in record]
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
    loss = figure.add_subplot(grid[0, :])
    loss.plot(*_line(steps, "nll"), color=BLUE, linewidth=1, label="training")
    loss.plot(*_line(held_out, "valid_nll"), "o-", color=ORANGE, markersize=4, label="validation")
    loss.set_ylabel("nats per token")
    loss.legend(frameon=False, labelcolor=GREY)
    rate = figure.add_subplot(grid[1, 0])
    rate.plot(*_line(steps, "learning_rate"), color=BLUE, linewidth=1.5)
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    speed = figure.add_subplot(grid[1, 1])
    speed.plot(*_line(steps, "tokens_per_second"), color=BLUE, linewidth=0.8)
    speed.set_ylabel("tokens per second")
    speed.set_ylim(bottom=0)
    for axes in (loss, rate, speed):
        axes.set_xlabel("step", color=GREY)
        axes.yaxis.label.set_color(GREY)
        axes.yaxis.get_offset_text().set_color(GREY)
        axes.tick_params(colors=GREY)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    return figure


def _line(records: Records, name: str) -> tuple[list[float], list[float]]:
    return [record["step"] for record in records], [record[name] for record in records]


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


if __name__ == "__main__":
    with plainly_said():
        finish(Path(sys.argv[1]), Console(stderr=True, soft_wrap=not sys.stderr.isatty()))
