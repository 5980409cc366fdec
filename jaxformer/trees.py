"""Pytrees as flat dicts of named arrays: the form in which they are stored and talked about."""

from __future__ import annotations

from typing import Any

import jax


def flatten(tree: Any) -> dict[str, Any]:
    """{"encoder/blocks/feed_forward/up_DF": leaf, ...}, whatever kinds of nodes the tree has."""
    return {
        "/".join(_name(part) for part in path if _name(part) != "value"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflatten(like: Any, named: dict[str, Any]) -> Any:
    """The tree with the nodes of `like` and the leaves of `named`.

    Raises:
      KeyError: a leaf of `like` is not named.
    """
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in flatten(like)])


def _name(part: Any) -> str:
    return str(getattr(part, "name", None) or getattr(part, "key", None) or getattr(part, "idx", 0))
