"""Eight virtual CPU devices, strict types and ranks: set before any test imports JAX."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation, of programs that run once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
