"""Our parameters by the names and in the shapes of other projects: what their files hold, made for tests."""

import jax
import numpy as np

from rcm_jax.convert import wan
from rcm_jax.convert.names import flat, rename_params
from rcm_jax.convert.places import Place


def published_tensors(params, table):
    """The parameters at the places of a table of convert/places.py, as numpy arrays of the dtype they have."""
    tensors = {}
    for path, value in flat(params).items():
        array = np.asarray(jax.device_get(value))
        match table(path, array.shape):
            case Place() as place:
                tensors[place.name] = publish(path, array, place)
            case places:
                tensors |= {p.name: publish(path, layer, p) for p, layer in zip(places, array, strict=True)}
    return tensors


def publish(path, array, place):
    """The parameter at `path`, of one layer: PyTorch's kernels are (out, in, window...), ours (window..., in, out)."""
    if path.endswith("kernel"):
        array = np.moveaxis(array, (-1, -2), (0, 1))
    return np.ascontiguousarray(array).reshape(place.shape)


def wan_of_diffusers(params, config):
    """The parameters of a Wan network as diffusers' WanTransformer3DModel holds them."""
    tensors = rename_params(params, wan.DIFFUSERS)
    weight = tensors["patch_embedding.weight"]
    return tensors | {"patch_embedding.weight": weight.reshape(len(weight), config.in_channels, *config.patch)}
