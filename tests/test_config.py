import dataclasses
import importlib
import json
import math
from pathlib import Path

import jax
import ml_collections
import pytest

from jaxformer import trees
from jaxformer.config import Config, choose, default, head_dim, kv_heads
from jaxformer.errors import UserError
from jaxformer.model import Transformer

CONFIGS = Path(__file__).parent.parent / "configs"


def config_with(**fields) -> ml_collections.ConfigDict:
    """The default config with fields given as section__name=value."""
    c = default()
    for name, value in fields.items():
        section, field = name.split("__")
        with c.ignore_type():
            c[section][field] = value
    return c


def presets():
    """(file, preset) of every config that comes with the project."""
    for path in sorted(CONFIGS.glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if hasattr(module, "get_config"):
            for preset in getattr(module, "PRESETS", [None]):
                yield pytest.param(module, preset, id=f"{path.stem}:{preset or ''}")


def build(module, preset) -> Config:
    return Config.of(module.get_config(*([] if preset is None else [preset])))


def test_defaults_make_a_config_of_the_papers_base_model():
    config = Config.of(default())
    assert config == Config()
    model = config.model
    assert (model.d_model, model.num_heads, model.d_ff) == (512, 8, 2048)
    assert (model.encoder_layers, model.decoder_layers) == (6, 6)
    assert (head_dim(model), kv_heads(model)) == (64, 8)


def test_overrides_arrive_typed_and_frozen():
    c = config_with(model__d_model=64, optimizer__learning_rate=2, mesh__fsdp=4)
    config = Config.of(c)
    assert config.model.d_model == 64
    assert config.mesh.fsdp == 4
    assert type(config.optimizer.learning_rate) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert hash(config) == hash(Config.of(c))


def test_json_brings_the_same_config_back():
    config = Config.of(config_with(model__norm="rms", data__source="de", optimizer__epsilon=1e-7))
    line = config.to_json()
    assert "\n" not in line
    assert Config.of(json.loads(line)) == config


def test_sections_may_be_left_out():
    assert Config.of({"seed": 3, "model": {"d_ff": 8}}).model.d_ff == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"d_modle": 8}}, r"config\.model\.d_modle .*config\.model\.d_model\?"),
        ({"optimiser": {}}, r"config\.optimiser .*config\.optimizer\?"),
        ({"data": {"zzz": 1}}, r"config\.data\.zzz does not exist: known: .*'vocab_size'"),
    ],
)
def test_a_misspelt_field_is_told_its_nearest_name(values, message):
    with pytest.raises(UserError, match=message):
        Config.of(values)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("model__d_model", "512", "int"),
        ("model__d_model", 512.0, "int"),
        ("train__steps", True, "int"),
        ("model__bias", 1, "bool"),
        ("model__dropout", "0.1", "float"),
        ("data__name", 3, "str"),
        ("data__name", None, "str"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name, value, kind):
    field = name.replace("__", ".")
    with pytest.raises(UserError) as caught:
        Config.of(config_with(**{name: value}))
    assert str(caught.value) == f"config.{field} is {value!r}; it must be a {kind}."


def test_a_section_must_hold_fields():
    with pytest.raises(UserError, match=r"^config\.model is 3; it must hold fields\.$"):
        Config.of({"model": 3})


IMPOSSIBLE = [
    ({"model__activation": "tanh"}, "config.model.activation is 'tanh'", "relu, gelu, swiglu"),
    ({"model__norm": "batch"}, "config.model.norm is 'batch'", "layer, rms"),
    ({"model__norm_position": "mid"}, "config.model.norm_position is 'mid'", "post, pre"),
    (
        {"model__positions": "absolute"},
        "config.model.positions is 'absolute'",
        "sinusoidal, learned, rotary",
    ),
    ({"model__dtype": "float16"}, "config.model.dtype is 'float16'", "float32, bfloat16"),
    ({"optimizer__beta2": 1.0}, "config.optimizer.beta2 is 1.0", "[0, 1)"),
    ({"optimizer__epsilon": 0.0}, "config.optimizer.epsilon is 0.0", "above 0"),
    ({"optimizer__weight_decay": 0.1}, "config.optimizer.weight_decay=0.1", "'adamw'"),
    (
        {"optimizer__learning_rate": float("nan")},
        "config.optimizer.learning_rate is nan",
        "least 0",
    ),
    ({"optimizer__clip_norm": float("inf")}, "config.optimizer.clip_norm is inf", "least 0"),
    ({"decode__alpha": -0.1}, "config.decode.alpha is -0.1", "at least 0"),
    ({"optimizer__name": "sgd"}, "config.optimizer.name is 'sgd'", "adam, adamw"),
    (
        {"optimizer__schedule": "flat"},
        "config.optimizer.schedule is 'flat'",
        "paper, cosine, linear",
    ),
    ({"model__d_model": 0}, "config.model.d_model is 0", "at least 1"),
    ({"model__num_heads": 0}, "config.model.num_heads is 0", "at least 1"),
    ({"model__num_kv_heads": -1}, "config.model.num_kv_heads is -1", "at least 0"),
    ({"model__encoder_layers": 0}, "config.model.encoder_layers is 0", "at least 1"),
    ({"data__vocab_size": 5}, "config.data.vocab_size is 5", "at least 16"),
    ({"data__target_length": 1}, "config.data.target_length is 1", "at least 2"),
    ({"optimizer__accumulate": 0}, "config.optimizer.accumulate is 0", "at least 1"),
    ({"optimizer__learning_rate": -0.5}, "config.optimizer.learning_rate is -0.5", "at least 0"),
    ({"train__steps": 0}, "config.train.steps is 0", "at least 1"),
    ({"train__keep_checkpoints": 0}, "config.train.keep_checkpoints is 0", "at least 1"),
    ({"decode__beam": 0}, "config.decode.beam is 0", "at least 1"),
    ({"model__dropout": 1.0}, "config.model.dropout is 1.0", "in [0, 1)"),
    ({"model__attention_dropout": -0.1}, "config.model.attention_dropout is -0.1", "in [0, 1)"),
    ({"optimizer__ema_decay": 1.5}, "config.optimizer.ema_decay is 1.5", "in [0, 1)"),
    ({"train__label_smoothing": 1.0}, "config.train.label_smoothing is 1.0", "in [0, 1)"),
    ({"train__label_smoothing": math.nan}, "config.train.label_smoothing is nan", "in [0, 1)"),
    ({"model__num_heads": 6}, "config.model.num_heads=6", "config.model.d_model=512"),
    ({"model__num_kv_heads": 3}, "config.model.num_kv_heads=3", "config.model.num_heads=8"),
    (
        {"model__positions": "rotary", "model__head_dim": 15},
        "heads have 15 dimensions",
        "config.model.head_dim even",
    ),
    ({"model__d_model": 513, "model__head_dim": 64}, "config.model.d_model=513", "even"),
    ({"data__tokens_per_batch": 100}, "config.data.tokens_per_batch=100", "target_length=128"),
    ({"optimizer__accumulate": 3}, "config.optimizer.accumulate=3", "32 rows"),
    (
        {"model__positions": "learned", "model__max_length": 100},
        "config.model.max_length=100",
        "raise it to 256",
    ),
    (
        {"model__positions": "learned", "model__max_length": 256, "data__source_length": 300},
        "config.model.max_length=256",
        "raise it to 300",
    ),
    ({"mesh__fsdp": -1}, "config.mesh is {'data': -1, 'fsdp': -1", "at most one may be -1"),
    ({"mesh__tensor": 0}, "'tensor': 0", "positive number"),
    ({"mesh__context": -2}, "'context': -2", "positive number"),
]


@pytest.mark.parametrize(
    ("fields", "what", "cure"), IMPOSSIBLE, ids=[",".join(fields) for fields, _, _ in IMPOSSIBLE]
)
def test_an_impossible_value_is_named_with_its_cure(fields, what, cure):
    with pytest.raises(UserError) as caught:
        Config.of(config_with(**fields))
    assert what in str(caught.value)
    assert cure in str(caught.value)


def test_an_unknown_preset_is_told_the_known_ones():
    assert choose("b", {"a": 1, "b": 2}) == 2
    with pytest.raises(UserError, match=r"no preset 'c'; choose one of a, b\."):
        choose("c", {"a": 1, "b": 2})


@pytest.mark.parametrize(("module", "preset"), list(presets()))
def test_configs_of_the_project_can_run(module, preset):
    config = build(module, preset)
    assert config != Config()


# Biases and norms as we have them; the paper does not say. Its own numbers are 65 and 213 million
# at "about 37,000" tokens. With exactly 37,000, base has 63.1 million (65 would need 40,700 tokens)
# and big 214.2 million (213 would need 35,800): no one vocabulary gives both. So the count is held
# to our formula exactly, and to the paper's within 3 percent.
PAPER_SIZES = [("base", 512, 2048, 63_082_496, 65e6), ("big", 1024, 4096, 214_245_376, 213e6)]


@pytest.mark.parametrize(("preset", "D", "F", "count", "papers"), PAPER_SIZES)
def test_the_papers_models_have_the_papers_sizes(preset, D, F, count, papers):
    config = build(importlib.import_module("configs.wmt"), preset)
    V = config.data.vocab_size
    attention = 4 * (D * D + D)
    feed_forward = (D * F + F) + (F * D + D)
    norm = 2 * D
    encoder = 6 * (attention + feed_forward + 2 * norm)
    decoder = 6 * (2 * attention + feed_forward + 3 * norm)
    assert V == 37_000
    assert V * D + encoder + decoder == count
    shapes = jax.eval_shape(lambda: Transformer(config.model, V, jax.random.key(0)))
    assert sum(leaf.size for leaf in trees.flatten(shapes).values()) == count
    assert abs(count / papers - 1) < 0.03


def test_the_papers_recipe_is_the_papers():
    wmt = importlib.import_module("configs.wmt")
    for preset, dropout, steps in [("base", 0.1, 100_000), ("big", 0.3, 300_000)]:
        config = build(wmt, preset)
        adam = config.optimizer
        assert (adam.name, adam.beta1, adam.beta2, adam.epsilon) == ("adam", 0.9, 0.98, 1e-9)
        assert (adam.schedule, adam.learning_rate, adam.warmup_steps) == ("paper", 1.0, 4000)
        assert (adam.weight_decay, adam.clip_norm, adam.ema_decay) == (0.0, 0.0, 0.0)
        assert (config.model.dropout, config.model.attention_dropout) == (dropout, 0.0)
        assert (config.train.label_smoothing, config.train.steps) == (0.1, steps)
        assert abs(config.data.tokens_per_batch / 25_000 - 1) < 0.02
        assert (config.decode.beam, config.decode.alpha) == (4, 0.6)
    assert build(wmt, "base").data.name == "wmt19_translate/zh-en"
    german = build(wmt, "big_de_en").data
    assert (german.name, german.source, german.target) == ("wmt14_translate/de-en", "en", "de")
