"""What every attention back end must do: values and derivatives against float64, composition, memory, errors.

TPU kernels run in Pallas' interpreter here, which also looks for races; test_mosaic_tpu.py compiles them for TPUs.
"""

import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from pallas_kernels import attention, attention_given, portable

IMPLEMENTATIONS = ("reference", "portable", "mosaic_tpu")
PLAIN_JAX = ("reference", "portable")
LINEAR_MEMORY = ("portable",)
BLOCK = portable.BLOCK


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int, int]  # batch, query length, key length, heads, head dim
    dtype: str = "float32"
    logit: float = 1.0  # standard deviation of the logits
    tangent: float = 1.0  # standard deviation of the tangents

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("one query and one key", (2, 1, 1, 2, 8)),
    Case("one query", (1, 1, 77, 2, 32)),
    Case("one key", (2, 77, 1, 1, 16)),
    Case("self-attention", (2, 128, 128, 4, 48)),
    Case("cross-attention", (2, 64, 8, 4, 32)),
    Case("1003 tokens", (1, 1003, 1003, 1, 8)),
    Case("whole blocks", (1, 2 * BLOCK, BLOCK, 1, 8)),
    Case("one token more than blocks", (1, BLOCK + 1, 2 * BLOCK + 1, 1, 8)),
    Case("one token less than blocks", (1, BLOCK - 1, 2 * BLOCK - 1, 1, 8)),
    Case("bfloat16", (2, 100, 77, 2, 32), "bfloat16"),
    Case("bfloat16, blocks", (1, BLOCK + 10, BLOCK + 90, 1, 16), "bfloat16"),
    Case("float16", (2, 100, 77, 2, 32), "float16"),
    Case("float64, blocks", (2, 33, BLOCK + 90, 2, 16), "float64"),
    Case("large logits", (1, 64, BLOCK + 90, 2, 16), logit=50.0),
    Case("large logits, bfloat16", (1, 64, BLOCK + 90, 2, 16), "bfloat16", logit=50.0),
    Case("large tangents", (1, 64, BLOCK + 90, 2, 16), tangent=1e4),
    Case("large tangents, bfloat16", (1, 64, BLOCK + 90, 2, 16), "bfloat16", tangent=1e4),
    Case("large tangents, float16", (1, 64, 77, 2, 16), "float16", tangent=1e3),
)

# TPUs have no float64.
ACCURACY = [(x, case) for x in IMPLEMENTATIONS for case in CASES if (x, case.dtype) != ("mosaic_tpu", "float64")]


@pytest.fixture
def interpreter(request: pytest.FixtureRequest, implementation: str) -> None:
    if implementation == "mosaic_tpu":
        request.getfixturevalue("tpu_interpreter")


def draw(case: Case) -> dict[str, np.ndarray]:
    """Normal arrays, rounded to the case's dtype."""
    batch, queries, keys, heads, dim = case.shape
    q, k, lse = (batch, queries, heads, dim), (batch, keys, heads, dim), (batch, heads, queries)
    shapes = {"q": q, "k": k, "v": k, "tq": q, "tk": k, "tv": k, "dout": q, "dlse": lse}
    factors = {"q": case.logit, "tq": case.tangent, "tk": case.tangent, "tv": case.tangent}
    statistics = np.promote_types(case.dtype, "float32") if case.dtype == "float64" else np.float32
    rng = np.random.default_rng(0)
    arrays = {name: factors.get(name, 1.0) * rng.normal(size=shape) for name, shape in shapes.items()}
    return {name: x.astype(statistics if name == "dlse" else jnp.dtype(case.dtype)) for name, x in arrays.items()}


def softmax_attention(q, k, v):
    s_BNLS = jnp.einsum("blnh,bsnh->bnls", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bnls,bsnh->blnh", jax.nn.softmax(s_BNLS), v), jax.nn.logsumexp(s_BNLS, axis=-1)


@functools.cache
def expected(case: Case) -> dict[str, np.ndarray]:
    """Softmax attention, and JAX's own derivatives of it, in float64."""

    @jax.jit
    def run(q, k, v, tq, tk, tv, dout, dlse):
        (out, lse), (t_out, t_lse) = jax.jvp(softmax_attention, (q, k, v), (tq, tk, tv))
        dq, dk, dv = jax.vjp(softmax_attention, q, k, v)[1]((dout, dlse))
        return {"out": out, "lse": lse, "t_out": t_out, "t_lse": t_lse, "dq": dq, "dk": dk, "dv": dv}

    with jax.enable_x64(True):
        results = run(**{name: array.astype(np.float64) for name, array in draw(case).items()})
        return {name: np.asarray(array) for name, array in results.items()}


@functools.cache
def tolerances(case: Case) -> dict[str, float]:
    """Two standard errors: independent relative errors of a result's terms add as squares; its own is one more.

    Logits are float32 sums of products, so a probability carries the rounding of its logit. Operands of the second
    matmuls, and results, are rounded to the dtype as well. The terms are those of the textbook formulas.
    """
    x = {name: array.astype(np.float64) for name, array in draw(case).items()} | expected(case)
    scale = 1 / math.sqrt(case.shape[-1])
    s, ts_q, ts_k, dp = (
        np.einsum("blnh,bsnh->bnls", x[a], x[b]) for a, b in (("q", "k"), ("tq", "k"), ("q", "tk"), ("dout", "v"))
    )
    p = np.exp(scale * s - x["lse"][..., None])
    ts = scale * (ts_q + ts_k)
    h = p * np.hypot(ts, x["t_lse"][..., None])
    delta = np.hypot(norm("blnh,blnh->bnl", x["dout"], x["out"]), x["dlse"])
    ds = scale * p * np.hypot(dp, delta[..., None])

    rounding, rounding_of_sums = jnp.finfo(case.dtype).eps, jnp.finfo(draw(case)["dlse"].dtype).eps
    logit_error = rounding_of_sums * (1 + scale * max(np.abs(s).max(), norm("blnh,bsnh->bnls", x["q"], x["k"]).max()))
    ts_error = norm("blnh,bsnh->bnls", x["tq"], x["k"]) + norm("blnh,bsnh->bnls", x["q"], x["tk"])
    terms = {
        "out": norm("bnls,bsnh->blnh", p, x["v"]),
        "t_out": norm("bnls,bsnh->blnh", p, x["tv"]) + norm("bnls,bsnh->blnh", h, x["v"]),
        "dq": norm("bnls,bsnh->blnh", ds, x["k"]),
        "dk": norm("bnls,blnh->bsnh", ds, x["q"]),
        "dv": norm("bnls,blnh->bsnh", p, x["dout"]),
    }
    errors = {name: (rounding + logit_error) * (np.abs(x[name]) + term).max() for name, term in terms.items()}
    errors["lse"] = logit_error
    errors["t_lse"] = logit_error * np.abs(h).sum(-1).max() + rounding_of_sums * scale * ts_error.max()
    return {name: 2 * error for name, error in errors.items()}


def norm(equation: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The square root of the sum of squared terms of an einsum."""
    return np.sqrt(np.einsum(equation, x**2, y**2))


@functools.cache
def computed(implementation: str, case: Case) -> dict[str, dict[str, jax.Array]]:
    """Everything the back end computes, by mode, in one compiled function."""
    attend = functools.partial(attention, implementation=implementation, return_lse=True)

    @jax.jit
    def run(q, k, v, tq, tk, tv, dout, dlse):
        def value_and_tangent(q, k, v):
            return jax.jvp(functools.partial(attend, mode="forward"), (q, k, v), (tq, tk, tv))

        (out, lse), pull_back = jax.vjp(functools.partial(attend, mode="reverse"), q, k, v)
        reverse = dict(zip(("dq", "dk", "dv"), pull_back((dout, dlse)), strict=True), out=out, lse=lse)
        (out, lse), pull_back, (t_out, t_lse) = jax.vjp(value_and_tangent, q, k, v, has_aux=True)
        forward = dict(zip(("dq", "dk", "dv"), pull_back((dout, dlse)), strict=True), out=out, lse=lse)
        return {"reverse": reverse, "forward": {**forward, "t_out": t_out, "t_lse": t_lse}}

    with jax.enable_x64(case.dtype == "float64"):
        return run(**draw(case))


def assert_matches(implementation: str, case: Case, mode: str, *names: str) -> None:
    arguments = draw(case)
    for name in names:
        actual = computed(implementation, case)[mode][name]
        assert actual.dtype == arguments["dlse" if name in ("lse", "t_lse") else "q"].dtype, name
        np.testing.assert_allclose(
            np.asarray(actual, np.float64), expected(case)[name], rtol=0, atol=tolerances(case)[name], err_msg=name
        )


RESULTS = ("out", "lse", "dq", "dk", "dv", "t_out", "t_lse")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def count(jaxpr, *primitives: str) -> int:
    """How often the primitives occur in a jaxpr and in those inside it."""
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(x)]
    here = sum(eqn.primitive.name in primitives for eqn in jaxpr.eqns)
    return here + sum(count(getattr(x, "jaxpr", x), *primitives) for x in inner)


def is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def matmuls(f, *args) -> int:
    return count(jax.make_jaxpr(f)(*args).jaxpr, "dot_general", "pallas_call")


MESH_AXES = (AxisType.Auto, AxisType.Auto)
SHARDED = P("batch", None, "heads")


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("batch", "heads"), axis_types=MESH_AXES)


def twice(f):
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, None, length=2)[0]


def sharded(f):
    return lambda x: jax.shard_map(f, mesh=mesh(), in_specs=SHARDED, out_specs=SHARDED)(x)


def over_batch(f):
    return lambda x: jax.vmap(f)(x[:, None])[:, 0]


keep_attention = functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
)

# Each makes another function of an attention layer; `twice` applies it twice.
COMPOSITIONS = {
    "jit": jax.jit,
    "scan": twice,
    "checkpoint": jax.checkpoint,
    "projection kept by checkpoint": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "checkpoint in scan": lambda f: twice(jax.checkpoint(f)),
    "attention kept by checkpoint in scan": lambda f: twice(keep_attention(f)),
    "vmap": over_batch,
    "shard_map": sharded,
    "checkpoint in vmap in scan in shard_map": lambda f: sharded(twice(over_batch(jax.checkpoint(f)))),
}

# The interpreter of TPU kernels cannot run inside `jax.checkpoint` and `jax.vmap`.
INTERPRETED = ("jit", "scan", "shard_map")
COMPOSED = [(x, name) for x in IMPLEMENTATIONS for name in COMPOSITIONS if x in PLAIN_JAX or name in INTERPRETED]


def operands(x):
    return x @ (jnp.eye(8) - 0.25), 2 * x, x


def layer(x, mode, implementation="auto"):
    """Linear before attention and not linear after it, so that its gradient needs what attention returned."""
    return jnp.sin(attention(*operands(x), mode=mode, implementation=implementation))


def grad(f, x):
    return jax.grad(lambda x: jnp.sum(f(x) ** 2))(x)


def grad_of_value(f, x):
    """Gradient of the primal output of jvp, with a tangent that depends on x as well."""
    return jax.grad(lambda x: jnp.sum(jax.jvp(f, (x,), (3 * x,))[0] ** 2))(x)


def grad_of_tangent(f, x):
    return jax.grad(lambda x: jnp.sum(jax.jvp(f, (x,), (3 * x,))[1] ** 2))(x)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("implementation", "case"), ACCURACY, ids=str)
class TestAccuracy:
    @pytest.mark.parametrize("mode", ["reverse", "forward"])
    def test_value(self, implementation, case, mode):
        assert_matches(implementation, case, mode, "out", "lse")

    def test_gradient(self, implementation, case):
        assert_matches(implementation, case, "reverse", "dq", "dk", "dv")

    def test_tangent(self, implementation, case):
        assert_matches(implementation, case, "forward", "t_out", "t_lse")

    def test_gradient_of_the_primal_output_of_jvp(self, implementation, case):
        assert_matches(implementation, case, "forward", "dq", "dk", "dv")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestContract:
    @pytest.mark.parametrize("mode", ["reverse", "forward"])
    def test_scale(self, implementation, mode):
        q, k, v = normal(3, 2, 5, 2, 8)
        attend = jax.jit(
            functools.partial(attention, implementation=implementation, mode=mode), static_argnames="scale"
        )
        np.testing.assert_allclose(
            attend(q, k, v, scale=0.7), attend(0.7 * math.sqrt(8) * q, k, v), rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1), (1, 2)])
    def test_operands_without_tangent(self, implementation, moving):
        primals, tangents = normal(3, 2, 70, 2, 8), normal(3, 2, 70, 2, 8, seed=1)
        attend = functools.partial(attention, implementation=implementation, mode="forward", return_lse=True)

        def of_moving(*x):
            merged = dict(enumerate(primals)) | dict(zip(moving, x, strict=True))
            return attend(*merged.values())

        @jax.jit
        def actual_and_expected():
            padded = tuple(t if i in moving else jnp.zeros_like(t) for i, t in enumerate(tangents))
            actual = jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])
            return actual, jax.jvp(softmax_attention, tuple(primals), padded)

        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *actual_and_expected())

    def test_tangents_may_exceed_the_range_of_float16(self, implementation):
        """Two keys of equal weight whose logits have tangents of 80,000 and -80,000; t_out is 8,000."""
        q, tq = jnp.zeros((1, 1, 1, 16), jnp.float16), jnp.full((1, 1, 1, 16), 2e4, jnp.float16)
        k = jnp.array([1, -1], jnp.float16)[None, :, None, None] * jnp.ones((1, 1, 1, 16), jnp.float16)
        attend = functools.partial(attention, implementation=implementation, mode="forward")
        _, t_out = jax.jvp(lambda q: attend(q, k, k / 10), (q,), (tq,))
        np.testing.assert_allclose(t_out, np.full_like(t_out, 8000), rtol=2e-3)

    def test_given_is_the_output_it_was_given(self, implementation):
        q, k, v, out = normal(4, 2, 5, 2, 8)
        given = attention_given(q, k, v, out, jnp.zeros((2, 2, 5)), implementation=implementation)
        np.testing.assert_array_equal(given, out)

    def test_given_has_the_gradient_of_attention(self, implementation):
        q, k, v, cotangent = normal(4, 2, 70, 2, 8)
        attend = functools.partial(attention, implementation=implementation)
        out, lse = attend(q, k, v, return_lse=True)
        given = functools.partial(attention_given, implementation=implementation)
        *actual, dout, dlse = jax.vjp(given, q, k, v, out, lse)[1](cotangent)
        for a, b in zip(actual, jax.vjp(attend, q, k, v)[1](cotangent), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert not dout.any()
        assert not dlse.any()

    def test_given_takes_keys_a_part_at_a_time(self, implementation):
        """The softmax is that of the given lse, so gradients of parts of the keys add up: ring attention needs it."""
        q, k, v, cotangent = normal(4, 2, 70, 2, 8)
        out, lse = attention(q, k, v, return_lse=True)

        def pull_back(keys):
            given = functools.partial(attention_given, implementation=implementation)
            return jax.jit(lambda *x: jax.vjp(lambda *x: given(*x, out, lse), *x)[1](cotangent))(
                q, k[:, keys], v[:, keys]
            )

        (dq_a, *dkv_a), (dq_b, *dkv_b) = pull_back(slice(0, 30)), pull_back(slice(30, None))
        actual = dq_a + dq_b, *(jnp.concatenate(parts, 1) for parts in zip(dkv_a, dkv_b, strict=True))
        for a, b in zip(actual, jax.vjp(attention, q, k, v)[1](cotangent), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("implementation", "composition"), COMPOSED)
class TestComposition:
    def test_derivatives(self, implementation, composition):
        x = normal(4, 6, 2, 8)
        compose = COMPOSITIONS[composition]
        reverse, forward = (
            compose(functools.partial(layer, mode=mode, implementation=implementation))
            for mode in ("reverse", "forward")
        )

        def plain(x):
            once = jnp.sin(softmax_attention(*operands(x))[0])
            return jnp.sin(softmax_attention(*operands(once))[0]) if "scan" in composition else once

        @jax.jit
        def actual(x):
            return grad(reverse, x), grad_of_value(forward, x), *jax.jvp(forward, (x,), (3 * x,))

        @jax.jit
        def expected(x):
            return grad(plain, x), grad(plain, x), *jax.jvp(plain, (x,), (3 * x,))

        for a, b in zip(actual(x), expected(x), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", PLAIN_JAX)
class TestWork:
    """Counted in programs that do not run. Kernels are counted in compiled ones, for their devices."""

    def test_given_runs_no_forward_pass(self, implementation):
        q, k, v, out = normal(4, 1, 8, 1, 8)
        lse = jnp.zeros((1, 1, 8))

        def pull_back_given(q, k, v):
            given = functools.partial(attention_given, implementation=implementation)
            return jax.vjp(lambda *x: given(*x, out, lse), q, k, v)[1](out)

        def pull_back(q, k, v):
            return jax.vjp(functools.partial(attention, implementation=implementation), q, k, v)[1](out)

        forward = functools.partial(attention, implementation=implementation)
        assert matmuls(pull_back_given, q, k, v) == matmuls(pull_back, q, k, v) - matmuls(forward, q, k, v)

    def test_kept_outputs_spare_the_second_forward_pass(self, implementation):
        """jax.checkpoint with a policy that keeps "attention_out" and "attention_lse", in a scan over layers."""
        x = normal(1, 8, 1, 8)
        attend = functools.partial(attention, implementation=implementation)
        reverse, forward = (
            lambda x: attend(x, 2 * x, jnp.sin(x)),
            lambda x: attend(x, 2 * x, jnp.sin(x), mode="forward"),
        )

        def pull_back(x):
            given = functools.partial(attention_given, implementation=implementation)
            return grad(lambda x: given(x, 2 * x, jnp.sin(x), x, jnp.zeros((1, 1, 8))), x)

        kept = twice(keep_attention(reverse))
        assert matmuls(functools.partial(grad, kept), x) == matmuls(reverse, x) + matmuls(pull_back, x)

        kept = twice(keep_attention(forward))
        value_and_tangent = matmuls(lambda x: jax.jvp(forward, (x,), (x,)), x)
        assert matmuls(functools.partial(grad_of_value, kept), x) == value_and_tangent + matmuls(pull_back, x)


@pytest.mark.parametrize("implementation", PLAIN_JAX)
class TestPartitioning:
    """XLA splits plain JAX over a mesh by itself. A kernel needs `jax.shard_map`."""

    @pytest.mark.parametrize("mode", ["reverse", "forward"])
    def test_sharding_over_batch_and_heads_needs_no_communication(self, implementation, mode):
        x = jax.ShapeDtypeStruct((8, 6, 4, 8), jnp.float32, sharding=NamedSharding(mesh(), SHARDED))
        attend = functools.partial(layer, mode=mode, implementation=implementation)
        derivative = {"reverse": jax.vjp, "forward": lambda f, x: jax.vjp(lambda x: jax.jvp(f, (x,), (x,))[0], x)}[mode]
        compiled = jax.jit(lambda x: derivative(attend, x)[1](x), out_shardings=x.sharding).lower(x).compile().as_text()
        assert not [name for name in ("all-gather", "all-reduce", "all-to-all", "collective") if name in compiled]


@pytest.mark.parametrize("implementation", LINEAR_MEMORY)
class TestMemory:
    @pytest.mark.parametrize("derivative", ["value", "gradient", "tangent", "gradient of value"])
    def test_grows_with_the_length(self, implementation, derivative):
        mode = "reverse" if derivative in ("value", "gradient") else "forward"
        f = functools.partial(layer, mode=mode, implementation=implementation)
        run = {
            "value": f,
            "gradient": functools.partial(grad, f),
            "tangent": lambda x: jax.jvp(f, (x,), (x,)),
            "gradient of value": functools.partial(grad_of_value, f),
        }[derivative]

        def temporaries(length):
            x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
            return jax.jit(run).lower(x).compile().memory_analysis().temp_size_in_bytes

        assert temporaries(32 * BLOCK) - temporaries(16 * BLOCK) <= 2.2 * (
            temporaries(16 * BLOCK) - temporaries(8 * BLOCK)
        )

    def test_one_block_has_no_loop(self, implementation):
        f, g = (functools.partial(layer, mode=mode, implementation=implementation) for mode in ("reverse", "forward"))
        for run in (functools.partial(grad, f), functools.partial(grad_of_value, g)):
            x = jax.ShapeDtypeStruct((1, BLOCK, 1, 8), jnp.float32)
            assert count(jax.make_jaxpr(run)(x).jaxpr, "scan", "while") == 0


class TestPortable:
    @given(batch=st.integers(1, 2), queries=st.integers(1, 40), keys=st.integers(1, 40), heads=st.integers(1, 3))
    @settings(max_examples=6, deadline=None, derandomize=True)
    def test_any_shape(self, batch, queries, keys, heads):
        """Blocks of 8 rows, so that small arrays have many."""
        case = Case("drawn", (batch, queries, keys, heads, 4))
        with mock.patch.object(portable, "BLOCK", 8):
            results = computed.__wrapped__("portable", case)
        for mode, names in {"reverse": RESULTS[:5], "forward": RESULTS}.items():
            for name in names:
                np.testing.assert_allclose(
                    results[mode][name], expected(case)[name], rtol=0, atol=tolerances(case)[name]
                )

    @pytest.mark.parametrize(("mode", "derivatives"), [("reverse", ["rev"]), ("forward", ["fwd"])])
    def test_finite_differences(self, mode, derivatives):
        with jax.enable_x64(True), mock.patch.object(portable, "BLOCK", 8):
            primals = tuple(np.random.default_rng(0).normal(size=(3, 1, 19, 2, 4)))
            attend = jax.jit(functools.partial(attention, implementation="portable", mode=mode, return_lse=True))
            check_grads(attend, primals, order=1, modes=derivatives)

    def test_tangent_where_one_key_has_all_the_weight(self):
        """t_out is then tv of that key. Its large logit tangent cancels: bfloat16 must not see it."""
        q = k = 10 * jnp.eye(16)[None, :, None]
        v, tv = normal(2, 1, 16, 1, 16)
        tq = 1e3 * normal(1, 16, 1, 16)
        q, k, v, tq, tv = (x.astype(jnp.bfloat16) for x in (q, k, v, tq, tv))
        f = functools.partial(attention, implementation="portable", mode="forward")
        _, t_out = jax.jvp(f, (q, k, v), (tq, jnp.zeros_like(k), tv))
        np.testing.assert_allclose(t_out, tv, atol=0.02)


@pytest.mark.parametrize("composition", COMPOSITIONS)
class TestWrongDerivatives:
    def test_jvp_of_reverse_mode(self, composition):
        f = COMPOSITIONS[composition](functools.partial(layer, mode="reverse"))
        with pytest.raises(TypeError, match=r'for jax.jvp pass mode="forward"'):
            jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(normal(4, 6, 2, 8))

    def test_grad_of_forward_mode(self, composition):
        f = COMPOSITIONS[composition](functools.partial(layer, mode="forward"))
        with pytest.raises(TypeError, match=r'for jax.grad alone pass mode="reverse"'):
            jax.jit(functools.partial(grad, f))(normal(4, 6, 2, 8))

    def test_grad_of_tangent(self, composition):
        """Only values tell: transposing a scan makes zeros of cotangents that nobody sends."""
        f = COMPOSITIONS[composition](functools.partial(layer, mode="forward"))
        assert np.isnan(jax.jit(functools.partial(grad_of_tangent, f))(normal(4, 6, 2, 8))).all()

    def test_grad_through_the_tangent_alone(self, composition):
        f = COMPOSITIONS[composition](functools.partial(layer, mode="forward"))
        x = normal(4, 6, 2, 8)
        with pytest.raises(TypeError, match=r"differentiate the primal output of jax.jvp only"):
            jax.jit(jax.grad(lambda tx: jnp.sum(jax.jvp(f, (x,), (tx,))[1])))(x)


class TestArguments:
    def arguments(self, **changes):
        shape = (2, 5, 3, 8)
        arrays = {name: jnp.zeros(shape) for name in ("q", "k", "v", "out")} | {"lse": jnp.zeros((2, 3, 5))}
        return (arrays | changes).values()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"q": jnp.zeros((5, 3, 8))}, r"q.shape=\(5, 3, 8\) must have 4 axes"),
            ({"k": jnp.zeros((2, 5, 24))}, r"k.shape=\(2, 5, 24\) must have 4 axes"),
            ({"v": jnp.zeros((1, 2, 5, 3, 8))}, r"v.shape=\(1, 2, 5, 3, 8\) must have 4 axes"),
            ({"q": jnp.zeros((2, 0, 3, 8))}, r"q.shape=\(2, 0, 3, 8\) must have no empty axis"),
            ({"k": jnp.zeros((2, 0, 3, 8))}, r"k.shape=\(2, 0, 3, 8\) must have no empty axis"),
            ({"k": jnp.zeros((1, 5, 3, 8))}, r"k.shape=\(1, 5, 3, 8\) must be \(2, 5, 3, 8\)"),
            ({"k": jnp.zeros((2, 5, 1, 8))}, r"k.shape=\(2, 5, 1, 8\) must be \(2, 5, 3, 8\)"),
            ({"k": jnp.zeros((2, 5, 3, 4))}, r"k.shape=\(2, 5, 3, 4\) must be \(2, 5, 3, 8\)"),
            ({"v": jnp.zeros((2, 6, 3, 8))}, r"v.shape=\(2, 6, 3, 8\) must be \(2, 5, 3, 8\)"),
            ({"v": jnp.zeros((2, 5, 3, 9))}, r"v.shape=\(2, 5, 3, 9\) must be \(2, 5, 3, 8\)"),
            ({"q": jnp.zeros((2, 5, 3, 8), jnp.int32)}, "q.dtype=int32 must be one of bfloat16, float16, float32"),
            ({"k": jnp.zeros((2, 5, 3, 8), jnp.bfloat16)}, "k.dtype=bfloat16 must be float32"),
            ({"v": jnp.zeros((2, 5, 3, 8), jnp.float16)}, "v.dtype=float16 must be float32"),
        ],
    )
    def test_operands(self, changes, message):
        with pytest.raises(ValueError, match=message):
            attention_given(*self.arguments(**changes))
        q, k, v, *_ = self.arguments(**changes)
        with pytest.raises(ValueError, match=message):
            attention(q, k, v)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"out": jnp.zeros((2, 5, 3, 9))}, r"out.shape=\(2, 5, 3, 9\) must be \(2, 5, 3, 8\)"),
            ({"out": jnp.zeros((2, 5, 3, 8), jnp.bfloat16)}, "out.dtype=bfloat16 must be float32"),
            ({"lse": jnp.zeros((2, 5, 3))}, r"lse.shape=\(2, 5, 3\) must be \(2, 3, 5\)"),
            ({"lse": jnp.zeros((2, 3, 5), jnp.float16)}, "lse.dtype=float16 must be float32"),
        ],
    )
    def test_given_results(self, changes, message):
        with pytest.raises(ValueError, match=message):
            attention_given(*self.arguments(**changes))

    def test_names(self):
        q, k, v, *_ = self.arguments()
        names = '"auto", "deterministic", "mosaic_gpu", "cudnn", "mosaic_tpu", "portable" or "reference"'
        with pytest.raises(ValueError, match=rf"implementation='triton' must be {names}"):
            attention(q, k, v, implementation="triton")
        with pytest.raises(ValueError, match=r'mode=\'both\' must be "reverse" or "forward"'):
            attention(q, k, v, mode="both")

    def test_given_is_reverse_only(self):
        x = normal(1, 5, 2, 8)
        with pytest.raises(TypeError, match=r"attention_given is for jax.grad and jax.vjp only"):
            jax.jvp(lambda x: attention_given(x, x, x, x, jnp.zeros((1, 2, 5))), (x,), (x,))
