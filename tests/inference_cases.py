"""A tiny random model and its tokenizer, saved as training saves them."""

import base64
import dataclasses
import functools

import jax
from training_cases import TINY, change

from jaxformer.checkpoint import Checkpoints
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.training import state as training_state
from jaxformer.training.optimizer import make

TEXT = (
    "史蒂夫建造房子。",
    "他看见红色的方块！",
    "你在哪里？",
    "Steve builds a house.",
    "He sees a red block!",
    "Where are you?",
)
SENTENCES, CHARACTERS = TEXT[:3], sorted(set("".join(TEXT[:3])))

# Sources of up to 31 tokens stay whole: two buckets, and few programs to compile.
CONFIG = change(
    TINY, model__max_length=32, decode__beam=2, decode__max_length=12, decode__tokens_per_batch=128
)


@functools.cache
def tokenizer():
    return Tokenizer.train(TEXT, 400)


@functools.cache
def fresh():
    """As training begins."""
    vocab_size, optimizer = tokenizer().vocab_size, make(CONFIG)
    return jax.jit(lambda: training_state.init(CONFIG, vocab_size, optimizer))()


def state(step):
    """Scaled up, so that the choices of the model differ, and other weights at each step."""
    params = jax.tree.map(lambda leaf: leaf * (1 + step / 2), fresh()["params"])
    return fresh() | {"params": params}


def write_run(workdir):
    """The checkpoints of steps 1 and 2, of different weights."""
    checkpoints = Checkpoints(workdir, keep=2)
    for step in (1, 2):
        meta = {
            "step": step,
            "config": dataclasses.asdict(CONFIG),
            "tokenizer": base64.b64encode(tokenizer().to_bytes()).decode(),
            "data_fingerprint": "",
        }
        checkpoints.save(step, training_state.to_named(state(step)), meta)
    checkpoints.close()
    return workdir
