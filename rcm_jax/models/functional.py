"""A Flax NNX module as two pure functions over a plain dict of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx


class Network(NamedTuple):
    """`init(key) -> params` and `apply(params, *args, **kwargs)`, as of one NNX module."""

    init: Callable[[jax.Array], dict[str, Any]]
    apply: Callable[..., Any]

    def abstract_params(self) -> dict[str, Any]:
        """Shapes and dtypes of the parameters; allocates nothing."""
        return jax.eval_shape(self.init, jax.random.key(0))


def functional(create: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """Splits the module that `create` builds into its structure, kept, and its parameters, passed by the caller."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))

    def init(key: jax.Array) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(create(nnx.Rngs(key)), nnx.Param))

    def apply(params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graph, params)(*args, **kwargs)

    return Network(init, apply)
