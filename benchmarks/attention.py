"""Our attention kernels beside every rival that is installed: speed, error, ratio.

    python -m benchmarks.attention --out=benchmarks/results/attention.json --plot=benchmarks/results/attention.png \
        --rcm=PATH/rcm/utils/flash_attention_jvp_triton.py

On an NVIDIA GPU. Rivals: cuDNN through JAX, and, where they are installed, cuDNN through PyTorch, tokamax,
jvp_flash_attention, and rCM's Triton kernel, whose file is named by --rcm. TFLOP/s count 2 products for values, 6 for
values with tangents, 5 for gradients, whatever a kernel does. Contestants take turns, `--rounds` times, on the same
random inputs; the median counts. The error is the Frobenius norm against float64, relative, over some rows of one
head.
"""

import argparse
import functools
import importlib.util
import platform
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import cudnn, mosaic_gpu
from rcm_jax import media

# batch, heads, queries, keys, head dim
SHAPES = (
    (1, 12, 8192, 8192, 128),
    (1, 12, 32760, 32760, 128),
    (1, 12, 32768, 32768, 128),
    (1, 5, 32760, 32760, 128),
    (1, 12, 32760, 512, 128),
    (1, 12, 32760, 2048, 128),
    (4, 16, 4096, 4096, 64),
)
PRODUCTS = {"value": 2, "value and tangent": 6, "gradient": 5}
NAMES = ("q", "k", "v", "tq", "tk", "tv", "dout")
SAMPLED_ROWS = 128


class Contestant(NamedTuple):
    """`run()` starts work and returns its results, `wait(results)` awaits them.

    `sample(results)` returns some rows of the first head of each result, float64.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    sample: Callable[[Any], list[np.ndarray]]


def main() -> None:
    """Measures every shape, prints a Markdown table, writes JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of all measurements")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of them; needs matplotlib")
    parser.add_argument("--rcm", type=Path, metavar="FILE", help="rCM's flash_attention_jvp_triton.py")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each contestant")
    parser.add_argument("--shapes", type=int, nargs="+", metavar="I", help="which of SHAPES; all if not given")
    arguments = parser.parse_args()
    rcm = load_rcm(arguments.rcm) if arguments.rcm else None
    shapes = [SHAPES[i] for i in arguments.shapes] if arguments.shapes else SHAPES
    results = {
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "matmul": measure_matmul(),
        "command": " ".join(["python -m benchmarks.attention", *sys.argv[1:]]),
        "rows": [],
    }
    for shape in shapes:
        results["rows"] += measure_shape(shape, rcm, arguments.rounds)
        results["torch"] = getattr(sys.modules.get("torch"), "__version__", None)
        media.write_file(arguments.out, media.json_text(results, indent=1).encode())
    print(table(results))
    if arguments.plot:
        plot(results, arguments.plot)


def measure_shape(shape: tuple[int, ...], rcm: Any, rounds: int) -> list[dict[str, Any]]:
    """One row for each pass and contestant of a shape."""
    batch, heads, queries, keys, head_dim = shape
    inputs = draw(shape)
    rows = []
    for name, products in PRODUCTS.items():
        expected = expected_rows(inputs, name)
        contestants = our_contestants(inputs, name) | torch_contestants(inputs, name, rcm) | tokamax(inputs, name)
        for contestant, milliseconds, results in compete(contestants, rounds):
            actual = contestants[contestant].sample(results)
            flop = 2 * products * batch * heads * queries * keys * head_dim
            rows.append(
                {"shape": shape, "pass": name, "contestant": contestant, "ms": milliseconds}
                | {"tflops": flop / milliseconds * 1e-9, "error": relative_error(actual, expected)}
            )
            print(rows[-1], flush=True)
    return rows


def draw(shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """Standard normal operands, tangents and cotangent, bfloat16, (B, L, N, H)."""
    batch, heads, queries, keys, head_dim = shape
    return {
        name: jax.random.normal(
            key, (batch, queries if "q" in name or name == "dout" else keys, heads, head_dim), jnp.bfloat16
        )
        for name, key in zip(NAMES, jax.random.split(jax.random.key(0), len(NAMES)), strict=True)
    }


def our_contestants(inputs: dict[str, jax.Array], name: str) -> dict[str, Contestant]:
    """Ours, as `attention` chooses, and JAX's cuDNN; for gradients also our kernels where cuDNN's are chosen."""
    q, k, v, tq, tk, tv, dout = inputs.values()
    if name == "value and tangent":

        def value_and_tangent(q, k, v, tq, tk, tv):
            return jax.jvp(functools.partial(pallas_kernels.attention, mode="forward"), (q, k, v), (tq, tk, tv))

        return {"ours": jax_contestant(value_and_tangent, q, k, v, tq, tk, tv)}
    scale = q.shape[-1] ** -0.5
    if name == "value":
        return {
            "ours": jax_contestant(lambda q, k, v: [pallas_kernels.attention(q, k, v)], q, k, v),
            "cuDNN (JAX)": jax_contestant(lambda q, k, v: [cudnn.forward(q, k, v, scale=scale)[0]], q, k, v),
        }
    out, lse = pallas_kernels.attention(q, k, v, return_lse=True)

    def gradient(q, k, v, out, lse, dout):
        return jax.vjp(lambda q, k, v: pallas_kernels.attention_given(q, k, v, out, lse), q, k, v)[1](dout)

    back_ends = {"ours, Mosaic": mosaic_gpu, "cuDNN (JAX)": cudnn}
    return {"ours": jax_contestant(gradient, q, k, v, out, lse, dout)} | {
        label: jax_contestant(functools.partial(back_end.backward, dlse_BNL=None, scale=scale), q, k, v, out, lse, dout)
        for label, back_end in back_ends.items()
    }


def jax_contestant(function: Callable, *operands: jax.Array) -> Contestant:
    run = functools.partial(jax.jit(function), *operands)

    def sample(results):
        return [np.asarray(x[0, sampled(x.shape[1]), 0], np.float64) for x in results]

    return Contestant(run, jax.block_until_ready, sample)


def tokamax(inputs: dict[str, jax.Array], name: str) -> dict[str, Contestant]:
    """tokamax's attention, if it is installed; its gradient includes its forward pass, so it is left out."""
    if name != "value" or importlib.util.find_spec("tokamax") is None:
        return {}

    def value(q, k, v):
        import tokamax

        return [tokamax.dot_product_attention(q, k, v, implementation="mosaic")]

    return {"tokamax": jax_contestant(value, inputs["q"], inputs["k"], inputs["v"])}


def torch_contestants(inputs: dict[str, jax.Array], name: str, rcm: Any) -> dict[str, Contestant]:
    """PyTorch's cuDNN, if PyTorch is installed, and rCM's kernel, if it was given. Operands are (B, N, L, H) there."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, tq, tk, tv, dout = (torch.from_dlpack(jnp.swapaxes(x, 1, 2)).contiguous() for x in inputs.values())

    def wait(results):
        torch.cuda.synchronize()
        return results

    def sample(results):
        return [x[0, 0, sampled(x.shape[2])].double().cpu().numpy() for x in results]

    attend = torch.nn.functional.scaled_dot_product_attention
    if name == "value":

        def value():
            with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return [attend(q, k, v)]

        return {"cuDNN (PyTorch)": Contestant(value, wait, sample)}
    if name == "value and tangent":
        runs = {"rCM (Triton)": functools.partial(rcm, q, k, v, tq, tk, tv)} if rcm else {}
        if importlib.util.find_spec("jvp_flash_attention"):
            from jvp_flash_attention.jvp_attention import JVPAttn

            runs["jvp_flash_attention"] = functools.partial(torch.func.jvp, JVPAttn.fwd_dual, (q, k, v), (tq, tk, tv))
        return {label: Contestant(run, wait, sample) for label, run in runs.items()}
    operands = [x.requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        result = attend(*operands)
    gradient = functools.partial(torch.autograd.grad, result, operands, dout, retain_graph=True)
    return {"cuDNN (PyTorch)": Contestant(gradient, wait, sample)}


def load_rcm(path: Path) -> Callable:
    """rCM's attention, from its file, which imports flash_attn for gradients that are not asked of it here.

    It tries 48 configurations for every new shape, a minute each time.
    """
    for module in ("flash_attn", "flash_attn.flash_attn_interface"):
        sys.modules[module] = types.ModuleType(module)
    interface = sys.modules["flash_attn.flash_attn_interface"]
    interface._flash_attn_backward = interface._flash_attn_varlen_backward = lambda: None
    spec = importlib.util.spec_from_file_location("rcm_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.attention


def compete(contestants: dict[str, Contestant], rounds: int):
    """Yields (name, median milliseconds, results) of each contestant that runs."""
    ready, times = {}, {}
    for name, contestant in contestants.items():
        try:
            contestant.wait(contestant.run())
        except Exception as error:  # a rival's own failure must not end the measurement of the others
            print(f"{name} failed: {type(error).__name__}: {error}".splitlines()[0][:200], flush=True)
            continue
        start = time.perf_counter()
        results = contestant.wait(contestant.run())
        ready[name] = max(1, round(0.06 / (time.perf_counter() - start))), results
    for _ in range(rounds):
        for name, (calls, _) in ready.items():
            start = time.perf_counter()
            for _ in range(calls):
                results = contestants[name].run()
            contestants[name].wait(results)
            times.setdefault(name, []).append((time.perf_counter() - start) / calls)
    for name, (_, results) in ready.items():
        yield name, float(np.median(times[name])) * 1e3, results


def expected_rows(inputs: dict[str, jax.Array], name: str) -> list[np.ndarray]:
    """float64 results for sampled query rows of the first head; of a gradient, dq alone."""
    q, k, v, tq, tk, tv, dout = (np.asarray(x[0, :, 0], np.float64) for x in inputs.values())
    q, tq, dout = (x[sampled(len(x))] for x in (q, tq, dout))
    scale = q.shape[-1] ** -0.5
    s = scale * q @ k.T
    p = np.exp(s - s.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    if name == "value":
        return [p @ v]
    if name == "gradient":
        dp = dout @ v.T
        return [scale * (p * (dp - (p * dp).sum(1, keepdims=True))) @ k]
    h = p * scale * (tq @ k.T + q @ tk.T)
    return [p @ v, p @ tv + h @ v - h.sum(1, keepdims=True) * (p @ v)]


def relative_error(actual: list[np.ndarray], expected: list[np.ndarray]) -> list[float]:
    pairs = zip(actual, expected, strict=False)  # of a gradient, only dq is expected
    return [float(np.linalg.norm(a - e) / np.linalg.norm(e)) for a, e in pairs]


def sampled(length: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(length, SAMPLED_ROWS)).astype(int)


def measure_matmul() -> float:
    """TFLOP/s of one large bfloat16 product: what the chip gives that day."""
    a, b = (jax.random.normal(key, (8192, 8192), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    ((_, milliseconds, _),) = compete({"": jax_contestant(lambda a, b: [a @ b], a, b)}, 5)
    return 2 * 8192**3 / milliseconds * 1e-9


def table(results: dict[str, Any]) -> str:
    """The Markdown table of a results file."""
    lines = [
        f"{results['device']}, jax {results['jax']}, torch {results['torch']};"
        f" a bfloat16 product of 8192 x 8192 matrices: {results['matmul']:.0f} TFLOP/s",
        "",
        "| batch, heads, queries, keys, head dim | pass | contestant | ms | TFLOP/s | ours is faster by | error |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = {(tuple(r["shape"]), r["pass"]): r["ms"] for r in results["rows"] if r["contestant"] == "ours"}
    for row in results["rows"]:
        ratio = row["ms"] / ours[tuple(row["shape"]), row["pass"]]
        lines.append(
            f"| {', '.join(map(str, row['shape']))} | {row['pass']} | {row['contestant']} | {row['ms']:.3f} |"
            f" {row['tflops']:.0f} | {ratio:.2f} | {', '.join(f'{e:.1e}' for e in row['error'])} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of TFLOP/s by shape, one panel for each pass."""
    import matplotlib.pyplot as plt

    contestants = list(dict.fromkeys(row["contestant"] for row in results["rows"]))
    colours = dict(zip(contestants, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    figure, panels = plt.subplots(len(PRODUCTS), 1, figsize=(11, 9), sharex=True)
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in results["rows"]))
    for panel, name in zip(panels, PRODUCTS, strict=True):
        rows = [row for row in results["rows"] if row["pass"] == name]
        present = [c for c in contestants if any(row["contestant"] == c for row in rows)]
        for i, contestant in enumerate(present):
            mine = {tuple(row["shape"]): row["tflops"] for row in rows if row["contestant"] == contestant}
            places = [shapes.index(shape) + (i - len(present) / 2) * 0.15 for shape in mine]
            panel.bar(places, list(mine.values()), 0.14, label=contestant, color=colours[contestant])
        panel.set_ylabel(f"{name}\nTFLOP/s")
        panel.legend(fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    panels[-1].set_xticks(range(len(shapes)), ["{}, {}\n{}, {}\n{}".format(*shape) for shape in shapes], fontsize=8)
    panels[-1].set_xlabel("batch, heads, queries, keys, head dim")
    figure.suptitle(f"Attention on {results['device']}, bfloat16")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
