"""LoRA: which parameters a network learns beside a teacher's, their sum, and the file that other programs read."""

import jax
import numpy as np

from rcm_jax.convert.names import Table, flat, their_names
from rcm_jax.state import Params


def without(params: Params, base: Params) -> Params:
    """The part of a nested dict that `base` lacks."""
    own = {}
    for name, value in params.items():
        if name not in base:
            own[name] = value
        elif isinstance(value, dict) and (rest := without(value, base[name])):
            own[name] = rest
    return own


def merge(params: Params) -> Params:
    """A network's parameters, on the host, with every LoRA added to its matrix."""
    if "lora_a" not in params:
        return {name: merge(value) if isinstance(value, dict) else value for name, value in params.items()}
    kernel = params["kernel"] + np.matmul(params["lora_a"], params["lora_b"])
    return {name: params[name] for name in params if name not in ("kernel", "lora_a", "lora_b")} | {"kernel": kernel}


def lora_tensors(params: Params, table: Table) -> dict[str, np.ndarray]:
    """The LoRA of every block by its published name, as `--lora` of launch.convert and other programs read it.

    The prefix is "diffusion_model.", the scale 1 (alpha is the rank).
    """
    tensors = {}
    for path, stacked in flat(params).items():
        module, _, leaf = path.rpartition(".")
        if leaf in ("lora_a", "lora_b"):
            suffix = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}[leaf]
            names = their_names(f"{module}.kernel", len(stacked), table)
            for name, matrix in zip(names, np.asarray(jax.device_get(stacked)), strict=True):
                tensors[f"diffusion_model.{name.removesuffix('weight')}{suffix}"] = matrix.T
    return tensors
