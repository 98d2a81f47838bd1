"""The published networks of every family, by name."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from rcm_jax.models import cosmos, wan
from rcm_jax.models.blocks import WHOLE, BlockOps, Remat
from rcm_jax.models.functional import Network, functional

Config = wan.WanConfig | cosmos.CosmosConfig

PRESETS: dict[str, Config] = wan.PRESETS | cosmos.PRESETS


def create_network(
    config: Config, *, dtype: Any = jnp.float32, remat: Remat = "none", ops: BlockOps = WHOLE
) -> Network:
    """The network of a config, as pure functions. `dtype` is that of matrix products; parameters are float32."""

    def create(rngs: nnx.Rngs) -> nnx.Module:
        if isinstance(config, wan.WanConfig):
            return wan.Wan(config, dtype=dtype, remat=remat, ops=ops, rngs=rngs)
        return cosmos.Cosmos(config, dtype=dtype, remat=remat, ops=ops, rngs=rngs)

    return functional(create)
