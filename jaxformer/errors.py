"""What a person did wrong, said so that they can put it right."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input: one sentence that names the place and the cure.

    Commands print the sentence and exit with code 2; no traceback is shown. Raise it where the
    place (file, line, field) is known, never as a wrapper round an unknown failure.
    """
