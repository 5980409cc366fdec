"""The one configuration: typed, frozen, checked in one place.

`configs/*.py` fill an `ml_collections.ConfigDict` made by `default()`, the command line overrides
single fields of it, and `Config.of` turns the result into frozen dataclasses. Everything below the
command line sees only those.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from jaxformer.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of the Transformer. The defaults are the paper's base model."""

    d_model: int = 512
    num_heads: int = 8
    num_kv_heads: int = 0  # 0: as many as heads; fewer: grouped-query attention
    head_dim: int = 0  # 0: d_model / num_heads
    d_ff: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    activation: str = "relu"  # relu | gelu | swiglu
    norm: str = "layer"  # layer | rms
    norm_position: str = "post"  # post (the paper) | pre
    positions: str = "sinusoidal"  # sinusoidal | learned | rotary | none
    dropout: float = 0.1  # on sub-layer outputs and on both embedding sums (section 5.4)
    attention_dropout: float = 0.0  # on attention weights
    share_embeddings: bool = True  # one table for source and target tokens
    tie_output: bool = True  # the output layer is the target embedding, transposed
    bias: bool = True  # biases in projections and FFN
    max_length: int = 1024  # longest sentence in tokens; the size of the learned position table
    dtype: str = "float32"  # compute type of the matrix products: float32 | bfloat16
    remat: bool = False  # recompute each layer in the backward pass
    # How devices that share a row (mesh.context) see each other's keys: ring (they travel, one part
    # at a time: least memory) | gather (all at once: fewest messages).
    context_keys: str = "ring"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the parallel text is, and how it is cut into batches."""

    name: str = "zh_en"  # zh_en | steve | files | any tfds name, e.g. wmt19_translate/zh-en
    source: str = "zh"  # language keys of the dataset
    target: str = "en"
    train: str = "train"  # split names; with name="files": a path, or "sources.txt,targets.txt"
    valid: str = "validation"
    test: str = "test"
    data_dir: str = "data"
    vocab_size: int = 8000
    max_tokens: int = 0  # training sentences longer than this are left out; 0: the row length
    target_length: int = 128  # positions of a packed row
    source_length: int = 0  # 0: in proportion to the data
    tokens_per_batch: int = 4096  # target positions of a global batch
    workers: int = 0  # processes that prepare batches; 0: threads of this one


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Gradient descent."""

    name: str = "adam"  # adam | adamw
    schedule: str = "paper"  # paper: d_model^-.5 min(step^-.5, step warmup^-1.5) | cosine | linear
    learning_rate: float = 1.0  # peak for cosine and linear; a factor for paper
    warmup_steps: int = 4000
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-9
    weight_decay: float = 0.0  # adamw only; on matrices, not on norms and biases
    clip_norm: float = 0.0  # 0: off
    accumulate: int = 1  # micro-batches per update, weighted by tokens
    ema_decay: float = 0.0  # 0: off; otherwise the averaged weights are what translates


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    steps: int = 100_000
    label_smoothing: float = 0.1
    log_every: int = 10
    eval_every: int = 1000
    eval_batches: int = 0  # 0: the whole validation split
    checkpoint_every: int = 1000
    keep_checkpoints: int = 5
    keep_best: int = 1  # checkpoints kept besides, those with the lowest validation loss
    stop_seconds: int = 120  # a run that is told to stop and has not saved by then is ended
    max_nonfinite: int = 10  # skipped updates in a row that end the run


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How sentences are produced when nothing else is asked for."""

    beam: int = 4
    alpha: float = 0.6  # length penalty ((5 + n) / 6)^alpha
    max_length: int = 256  # tokens; hard stop of a translation
    tokens_per_batch: int = 2048  # source positions decoded together


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one of them may be -1 and takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run. Equal configs on equal data give bitwise equal runs."""

    seed: int = 0
    profile: bool = False  # leave a profiler trace of steps 10 to 15
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()
    mesh: MeshConfig = MeshConfig()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """The checked, frozen view of a ConfigDict or of `json.loads(config.to_json())`.

        Raises:
          UserError: an unknown field (the nearest known one is named) or an impossible value.
        """
        config = _build(cls, values, "")
        check(config)
        return config

    def to_json(self) -> str:
        """One line of JSON that `Config.of` reads back."""
        return json.dumps(dataclasses.asdict(self))


def default() -> ml_collections.ConfigDict:
    """All fields with their defaults, to be overridden by `configs/*.py`."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean config.{prefix}{near[0]}?" if near else f"known: {list(fields)}."
            raise UserError(f"config.{prefix}{name} does not exist: {hint}")
    made = {}
    for name, field in fields.items():
        if name not in values:
            continue
        value = values[name]
        if dataclasses.is_dataclass(field.default):
            if not hasattr(value, "items"):
                raise UserError(f"config.{prefix}{name} is {value!r}; it must hold fields.")
            made[name] = _build(type(field.default), value, f"{prefix}{name}.")
        else:
            made[name] = _typed(value, field.default, f"config.{prefix}{name}")
    return cls(**made)


def _typed(value: Any, default_value: Any, where: str) -> Any:
    wanted = type(default_value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise UserError(f"{where} is {value!r}; it must be a {wanted.__name__}.")
    return value


CHOICES = {
    "model.activation": ("relu", "gelu", "swiglu"),
    "model.norm": ("layer", "rms"),
    "model.norm_position": ("post", "pre"),
    "model.positions": ("sinusoidal", "learned", "rotary", "none"),
    "model.dtype": ("float32", "bfloat16"),
    "model.context_keys": ("ring", "gather"),
    "optimizer.name": ("adam", "adamw"),
    "optimizer.schedule": ("paper", "cosine", "linear"),
}

AT_LEAST = {
    "model.d_model": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 0,
    "model.head_dim": 0,
    "model.d_ff": 1,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "model.max_length": 2,
    "data.vocab_size": 16,
    "data.target_length": 2,
    "data.source_length": 0,
    "data.tokens_per_batch": 1,
    "data.max_tokens": 0,
    "data.workers": 0,
    "optimizer.learning_rate": 0.0,
    "optimizer.warmup_steps": 0,
    "optimizer.accumulate": 1,
    "optimizer.clip_norm": 0.0,
    "optimizer.weight_decay": 0.0,
    "train.steps": 1,
    "train.log_every": 1,
    "train.eval_every": 1,
    "train.eval_batches": 0,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 1,
    "train.keep_best": 0,
    "train.stop_seconds": 1,
    "train.max_nonfinite": 1,
    "decode.beam": 1,
    "decode.alpha": 0.0,
    "decode.max_length": 1,
    "decode.tokens_per_batch": 1,
}

FRACTIONS = (
    "model.dropout",
    "model.attention_dropout",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.ema_decay",
    "train.label_smoothing",
)


def check(config: Config) -> None:
    """Refuses a config that cannot work, before anything is built or compiled.

    Raises:
      UserError: names the field, its value and what would be right.
    """
    for name, choices in CHOICES.items():
        if _get(config, name) not in choices:
            raise UserError(
                f"config.{name} is {_get(config, name)!r}; choose one of {', '.join(choices)}."
            )
    for name, least in AT_LEAST.items():
        if not least <= _get(config, name) < math.inf:  # nor NaN
            value = _get(config, name)
            raise UserError(f"config.{name} is {value}; it must be at least {least:g}.")
    for name in FRACTIONS:
        if not 0.0 <= _get(config, name) < 1.0:
            raise UserError(f"config.{name} is {_get(config, name)}; it must be in [0, 1).")
    _check_optimizer(config.optimizer)
    _check_model(config.model)
    _check_batches(config)


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    if not 0 < optimizer.epsilon < math.inf:
        raise UserError(f"config.optimizer.epsilon is {optimizer.epsilon}; it must be above 0.")
    if optimizer.weight_decay and optimizer.name != "adamw":
        raise UserError(
            f"config.optimizer.weight_decay={optimizer.weight_decay} is for "
            "config.optimizer.name='adamw'; set it to 0 with adam."
        )


def _check_model(model: ModelConfig) -> None:
    if not model.head_dim and model.d_model % model.num_heads:
        raise UserError(
            f"config.model.num_heads={model.num_heads} does not divide "
            f"config.model.d_model={model.d_model}; change one of them, or set "
            "config.model.head_dim."
        )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise UserError(
            f"config.model.num_kv_heads={model.num_kv_heads} does not divide "
            f"config.model.num_heads={model.num_heads}."
        )
    if model.positions == "rotary" and head_dim(model) % 2:
        raise UserError(
            f"Rotary positions turn pairs of numbers, but heads have {head_dim(model)} dimensions; "
            "make config.model.head_dim even."
        )
    if model.positions == "sinusoidal" and model.d_model % 2:
        raise UserError(
            f"Sinusoidal positions come in sine and cosine pairs; config.model.d_model="
            f"{model.d_model} must be even."
        )


def _check_batches(config: Config) -> None:
    data = config.data
    rows = data.tokens_per_batch // data.target_length
    if rows < 1 or rows % config.optimizer.accumulate:
        raise UserError(
            f"config.data.tokens_per_batch={data.tokens_per_batch} holds {rows} rows of "
            f"config.data.target_length={data.target_length}; that must be at least one row for "
            f"each of the config.optimizer.accumulate={config.optimizer.accumulate} micro-batches, "
            "and divisible by them."
        )
    longest = max(data.target_length, data.source_length, config.decode.max_length)
    if config.model.positions == "learned" and longest > config.model.max_length:
        raise UserError(
            f"config.model.max_length={config.model.max_length} is shorter than a row or a "
            f"translation of {longest} tokens; learned positions end there: raise it to {longest}."
        )
    axes = dataclasses.astuple(config.mesh)
    if sum(size == -1 for size in axes) > 1 or any(size == 0 or size < -1 for size in axes):
        raise UserError(
            f"config.mesh is {dataclasses.asdict(config.mesh)}; each axis needs a positive number "
            "of devices, and at most one may be -1 (all that are left)."
        )


def head_dim(model: ModelConfig) -> int:
    """K, the size of one attention head."""
    return model.head_dim or model.d_model // model.num_heads


def kv_heads(model: ModelConfig) -> int:
    """The number of key and value heads."""
    return model.num_kv_heads or model.num_heads


def _get(config: Config, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


def choose(preset: str, presets: Mapping[str, Any]) -> Any:
    """The value of a preset of a config file.

    Raises:
      UserError: no such preset; the known ones are named.
    """
    if preset not in presets:
        raise UserError(f"There is no preset {preset!r}; choose one of {', '.join(presets)}.")
    return presets[preset]
