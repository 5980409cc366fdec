"""Checkpoints: pytrees and a little JSON in, the same out, on any number of devices.

A step is one directory, `<workdir>/checkpoints/<step>`:

    params/ ema/ train/   an Orbax checkpoint each, so that a translator reads only weights
    meta.json             what the caller wants to know of the run: config, tokenizer, step
    manifest.json         shape and dtype of every array, SHA-256 of every file above
    manifest.sha256       that of the manifest

It is written as `<step>.partial` and renamed when every byte is on disk, so a directory with a bare
number is complete. What happens to it later the checksums tell: "damaged" always means that a file
is no longer what was written, never that reading failed for some other reason.

Under `jax.distributed` every process makes the same calls, on a file system that all of them see.
Process 0 hashes, renames and deletes; the step it chooses is the step of all.
"""

from jaxformer.checkpoint.run import Checkpoints
from jaxformer.checkpoint.weights import load_weights

__all__ = ["Checkpoints", "load_weights"]
