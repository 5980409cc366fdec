"""The page: one file that holds the walk, its style and its script, and needs no network."""

from __future__ import annotations

import json
from importlib import resources

import jinja2

from jaxformer.explain.walk import Walk


def as_json(walk: Walk) -> str:
    """The walk as programs read it, and as it stands in the page."""
    return json.dumps(walk, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def render(walk: Walk) -> str:
    """The HTML of a walk."""

    def part(name: str) -> str:
        return resources.files("jaxformer.explain").joinpath(name).read_text("utf-8")

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(part("page.html.jinja")).render(
        walk=walk,
        # In a script element only "<" could end the element.
        data=as_json(walk).replace("<", "\\u003c"),
        css=part("page.css"),
        scripts=[part(f"{name}.js") for name in ("drawing", "figures", "page")],
    )
