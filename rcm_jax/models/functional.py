"""A Flax NNX module as two pure functions over a plain dict of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx


class Network(NamedTuple):
    """`init(key) -> params` and `apply(params, *args, **kwargs)`, as of one NNX module.

    Parameters are nested dicts with strings for keys, a list's numbers too, as files have them.
    """

    init: Callable[[jax.Array], dict[str, Any]]
    apply: Callable[..., Any]

    def abstract_params(self) -> dict[str, Any]:
        """Shapes and dtypes of the parameters; allocates nothing."""
        return jax.eval_shape(self.init, jax.random.key(0))


def functional(create: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """Splits the module that `create` builds into its structure, kept, and its parameters, passed by the caller."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))

    def init(key: jax.Array) -> dict[str, Any]:
        return _with_keys(str, nnx.to_pure_dict(nnx.state(create(nnx.Rngs(key)), nnx.Param)))

    def apply(params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graph, _with_keys(_key_of_list, params))(*args, **kwargs)

    return Network(init, apply)


def _with_keys(convert: Callable[[Any], Any], tree: Any) -> Any:
    return {convert(key): _with_keys(convert, value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _key_of_list(key: str) -> str | int:
    return int(key) if key.isdecimal() else key
