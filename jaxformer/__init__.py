"""jaxformer: the Transformer of "Attention is all you need" in JAX/Flax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxformer.inference.translator import Translator

__all__ = ["Translator"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `import jaxformer.config` should not wait for JAX.
    if name == "Translator":
        from jaxformer.inference.translator import Translator

        return Translator
    raise AttributeError(f"module 'jaxformer' has no attribute {name!r}")
