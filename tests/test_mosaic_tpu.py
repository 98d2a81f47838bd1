"""The TPU kernels beyond the contract of test_attention.py: numbers that only many tiles show, and programs for TPUs.

The interpreter runs kernels on the CPU. libtpu compiles them for TPUs that this machine does not have.
"""

import functools
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import attention, mosaic_tpu, reference

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
SHAPES = {  # batch, heads, queries, keys, head dim
    "480p": (1, 12, 32760, 32760, 128),
    "720p": (1, 5, 75600, 75600, 128),
    "480p to text": (1, 12, 32760, 512, 128),
    "head dim 64": (4, 16, 4096, 4096, 64),
}
KERNELS = ("forward", "forward_with_tangent", "backward")
# Every kernel for every chip and at every shape, though not each pair of a chip and a shape.
COMPILED = [
    (chip, kernel, list(SHAPES)[(i + j) % len(SHAPES)])
    for i, chip in enumerate(CHIPS)
    for j, kernel in enumerate(KERNELS)
]

small_tiles = mock.patch.object(mosaic_tpu, "ROW_BYTES", 256)  # 128 rows in bfloat16, and not fewer in float32


def arguments(kernel: str, shape, dtype=jnp.bfloat16, make=jax.ShapeDtypeStruct) -> list:
    batch, heads, queries, keys, dim = shape
    q, k, lse = (batch, queries, heads, dim), (batch, keys, heads, dim), (batch, heads, queries)
    shapes = {"forward": [q, k, k], "forward_with_tangent": [q, k, k, q, k, k], "backward": [q, k, k, q, lse, q, lse]}
    return [make(x, jnp.float32 if x == lse else dtype) for x in shapes[kernel]]


def run(kernel: str, arrays) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Results of the TPU kernel, and of the formulas in float32. A backward pass gets the formulas' out and lse."""
    exact = [x.astype(jnp.float32) for x in arrays]
    if kernel == "backward":
        exact[3], exact[4] = reference.forward(*exact[:3], scale=0.3)
        arrays = [*arrays[:3], exact[3].astype(arrays[3].dtype), exact[4], *arrays[5:]]
    actual, expected = (
        jax.jit(functools.partial(getattr(back_end, kernel), scale=0.3))(*x)
        for back_end, x in ((mosaic_tpu, arrays), (reference, exact))
    )
    return [np.asarray(x, np.float32) for x in actual], [np.asarray(x) for x in expected]


def normal(seed: int = 0):
    rng = np.random.default_rng(seed)
    return lambda shape, dtype: jnp.asarray(rng.normal(size=shape), dtype)


def assert_close(actual, expected, dtype):
    """Few roundings of results and operands to the dtype, and float32's in sums of up to 300 terms."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * max(jnp.finfo(dtype).eps, 1e-6) * max(1, np.abs(b).max()))


@pytest.mark.usefixtures("tpu_interpreter")
class TestTiles:
    @small_tiles
    @given(
        queries=st.integers(1, 300),
        keys=st.integers(1, 300),
        dim=st.integers(1, 160),
        dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
        kernel=st.sampled_from(KERNELS),
    )
    @settings(max_examples=4, deadline=None, derandomize=True)
    def test_any_shape(self, queries, keys, dim, dtype, kernel):
        drawn = arguments(kernel, (1, 1, queries, keys, dim), dtype, normal())
        drawn[0] /= dim**0.5
        assert_close(*run(kernel, drawn), dtype)

    @small_tiles
    def test_tangent_where_one_key_has_all_the_weight(self):
        """t_out is then tv of that key, whichever tile it is in. Its large logit tangent cancels before rounding."""
        key_of_query = np.linspace(0, 299, 48).astype(int)
        q = 20 * jnp.eye(48)[None, :, None]
        k = jnp.zeros((1, 300, 1, 48)).at[0, key_of_query, 0].set(q[0, :, 0])
        tq, v, tv = (normal(i)(x.shape, jnp.float32) for i, x in enumerate((q, k, k)))
        q, k, v, tq, tv = (x.astype(jnp.bfloat16) for x in (q, k, v, 1e3 * tq, tv))
        *_, t_out, _ = jax.jit(functools.partial(mosaic_tpu.forward_with_tangent, scale=0.3))(q, k, v, tq, None, tv)
        np.testing.assert_allclose(t_out, tv[:, key_of_query], rtol=jnp.finfo(jnp.bfloat16).eps)

    def test_relative_errors_are_those_of_rounding(self):
        """bfloat16 errs by 2^-8 / sqrt(3) of the power of two below, which is 1.6e-3 of a number on average.

        A result has two such errors, its own and that of the products it sums, together 2.3e-3.
        """
        drawn = arguments("forward_with_tangent", (1, 1, 1003, 1500, 64), jnp.bfloat16, normal())
        out, _, t_out, _ = (
            np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*run("forward_with_tangent", drawn), strict=True)
        )
        assert max(out, t_out) < 1.1 * 2.3e-3

    @small_tiles
    @mock.patch.object(mosaic_tpu, "DQ_BYTES", 128 * 4 * mosaic_tpu.LANES)
    def test_gradient_in_parts_of_the_queries(self):
        """VMEM for dq of 128 queries."""
        drawn = arguments("backward", (1, 2, 300, 200, 16), jnp.float32, normal())
        assert_close(*run("backward", drawn), jnp.float32)

    def test_vmap(self):
        """The interpreter takes the axis that `jax.vmap` adds only where no semantics are given for the others."""
        drawn = arguments("forward_with_tangent", (2, 1, 9, 7, 8), jnp.float32, normal())
        attend = functools.partial(mosaic_tpu.forward_with_tangent, scale=0.3)
        with mock.patch.object(pltpu, "CompilerParams", return_value=pltpu.CompilerParams()):
            actual = jax.jit(jax.vmap(attend))(*(x[:, None] for x in drawn))
        expected = jax.jit(functools.partial(reference.forward_with_tangent, scale=0.3))(*drawn)
        assert_close([x[:, 0] for x in actual], expected, jnp.float32)


@small_tiles
@pytest.mark.parametrize("kernel", KERNELS)
def test_two_tensor_cores_do_not_race(kernel, capsys):
    """As on v5p, where both share the tiles that may run at the same time."""
    drawn = arguments(kernel, (1, 2, 300, 200, 16), jnp.float32, normal())
    two_cores = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=1)
    with pltpu.force_tpu_interpret_mode(two_cores):
        actual, expected = run(kernel, drawn)
    assert "RACE DETECTED" not in capsys.readouterr().out
    assert_close(actual, expected, jnp.float32)


def devices(chip: str) -> list[jax.Device]:
    return topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices


def kernels(compiled) -> int:
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize(("chip", "kernel", "shape"), COMPILED)
def test_compiles_to_one_kernel_in_linear_memory(chip, kernel, shape):
    batch, heads, queries, keys, _ = SHAPES[shape]
    make = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(devices(chip)[0]))
    f = jax.jit(functools.partial(getattr(mosaic_tpu, kernel), scale=0.1))
    compiled = f.lower(*arguments(kernel, SHAPES[shape], make=make)).compile()
    assert kernels(compiled) == 1
    # At most a copy of each of eight arrays with heads outermost, in rows of 128 bfloat16 numbers.
    assert compiled.memory_analysis().temp_size_in_bytes <= 8 * 256 * batch * heads * max(queries, keys)


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dim", "dtype"), [(16, "bfloat16"), (72, "float16"), (256, "bfloat16"), (256, "float32")])
def test_compiles_for_other_head_dims_and_dtypes(kernel, dim, dtype):
    """At lengths that fill tiles, for a bound of memory is one of whole tiles."""
    make = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(devices("v5p")[0]))
    f = jax.jit(functools.partial(getattr(mosaic_tpu, kernel), scale=0.1))
    assert kernels(f.lower(*arguments(kernel, (1, 1, 2000, 3000, dim), dtype, make)).compile()) == 1


@pytest.mark.usefixtures("no_cache")
def test_training_step_runs_each_kernel_once():
    """The gradient of the primal output of jvp, attention kept by checkpoint, in a scan in a vmap on four chips."""
    mesh = Mesh(np.array(devices("v5p")).reshape(2, 2), ("batch", "heads"), axis_types=2 * (AxisType.Auto,))
    spec = P("batch", None, "heads")
    keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

    @functools.partial(jax.checkpoint, policy=keep)
    def layer(x):
        return attention(x, 2 * x, jnp.sin(x), mode="forward", implementation="mosaic_tpu")

    def layers(x):
        return jax.lax.scan(lambda x, _: (jax.vmap(layer)(x[:, None])[:, 0], None), x, None, length=3)[0]

    def loss(x):
        return jnp.sum(jax.jvp(layers, (x,), (x,))[0].astype(jnp.float32) ** 2)

    step = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=spec, out_specs=spec)
    x = jax.ShapeDtypeStruct((4, 200, 4, 64), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    compiled = jax.jit(step).lower(x).compile()
    assert kernels(compiled) == 2
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all") if name in compiled.as_text()]


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [
        ("float64", 8, r"takes bfloat16, float16, float32, not float64: pass \"auto\""),
        ("bfloat16", 264, r"takes head dims up to 256, not 264: pass \"auto\""),
    ],
)
def test_what_it_does_not_serve_is_refused_by_name_and_goes_to_plain_jax_by_auto(dtype, dim, message):
    with jax.enable_x64(True):
        x = jnp.ones((1, 4, 1, dim), dtype)
        with pytest.raises(NotImplementedError, match=message):
            attention(x, x, x, implementation="mosaic_tpu")
        with mock.patch.object(sys.modules["pallas_kernels.attention"], "_architecture", return_value="tpu"):
            program = jax.jit(attention).trace(x, x, x).jaxpr
    assert "pallas_call" not in str(program)


def test_what_it_serves_goes_to_it_by_auto():
    x = jnp.ones((1, 4, 1, 256), jnp.bfloat16)
    with mock.patch.object(sys.modules["pallas_kernels.attention"], "_architecture", return_value="tpu"):
        assert "pallas_call" in str(jax.jit(attention).trace(x, x, x).jaxpr)
