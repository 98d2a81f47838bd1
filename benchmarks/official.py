"""The official PyTorch networks of rCM, making the calls of its training phases: the rival of benchmarks.step.

    python -m benchmarks.official --rcm=CHECKOUT --latent 21 60 104

CHECKOUT is a clone of https://github.com/NVlabs/rcm. Wan 1.3B in bfloat16 with the official choice of checkpointing,
random weights, batch 1, no optimiser and no EMA. Prints JSON: seconds of each part, and its peak of memory above the
networks. rCM's attention kernel is tuned before anything is timed, a minute for each shape.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAN = dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
SIMULATION_STEPS = (1, 4)  # of 1, 2, 3 and 4 in turn: time is linear in them, so the mean of these is that of all


def main() -> None:
    """Times every part and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rcm", type=Path, required=True, metavar="DIR", help="a checkout of NVlabs/rcm")
    parser.add_argument("--latent", type=int, nargs=3, required=True, metavar=("T", "H", "W"))
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="timed runs of each part")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.rcm, arguments.latent, arguments.repeat)))


def measure(checkout: Path, latent: list[int], repeat: int) -> dict[str, Any]:
    """{"parts": {part: {"seconds", "bytes"}}, ...} of the networks in a checkout."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    teacher, student, fake = load_networks(checkout)
    x = torch.randn(1, 16, *latent, device="cuda", dtype=torch.bfloat16)
    time_BT = torch.full((1, 1), 500.0, device="cuda", dtype=torch.bfloat16)
    text, negative = torch.randn(2, 1, 512, 4096, device="cuda", dtype=torch.bfloat16)

    def guided() -> None:
        teacher(x, time_BT, text)
        teacher(x, time_BT, negative)

    def with_tangent() -> None:
        student((x, x), (time_BT, time_BT), text, withT=True)

    def learn(network: Any) -> None:
        network(x, time_BT, text).float().square().sum().backward()
        network.zero_grad(set_to_none=True)

    def scm() -> None:
        with torch.no_grad():
            guided()
            with_tangent()
        learn(student)

    def dmd(steps: int) -> None:
        with torch.no_grad():
            for _ in range(steps - 1):
                student(x, time_BT, text)
            fake(x, time_BT, text)
            guided()
        learn(student)

    def critic(steps: int) -> None:
        with torch.no_grad():
            for _ in range(steps):
                student(x, time_BT, text)
        learn(fake)

    def seconds(run: Callable[..., None], *operands: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(*operands)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def part(run: Callable[..., None], counts: tuple[int, ...] = (), gradient: bool = False) -> dict[str, float]:
        with contextlib.nullcontext() if gradient else torch.no_grad():
            seconds(run, *counts[:1])
            resident = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            times = [seconds(run, n) for n in counts] or [seconds(run) for _ in range(repeat)]
        middle = statistics.mean(times) if counts else statistics.median(times)
        return {"seconds": middle, "bytes": torch.cuda.max_memory_allocated() - resident}

    parts = {
        "teacher, one pass": part(lambda: teacher(x, time_BT, text)),
        "teacher, guided pair": part(guided),
        "student, value and tangent": part(with_tangent),
        "sCM step": part(scm, gradient=True),
        "DMD step, mean of 4": part(dmd, SIMULATION_STEPS, gradient=True),
        "critic step, mean of 4": part(critic, SIMULATION_STEPS, gradient=True),
    }
    return {"parts": parts, "torch": torch.__version__, "device": torch.cuda.get_device_name()}


def load_networks(checkout: Path) -> tuple[Any, Any, Any]:
    """Teacher, student (which has tangents) and fake score on the GPU, with small random weights everywhere."""
    import torch

    if not (checkout / "rcm" / "networks" / "wan2pt1_jvp.py").is_file():
        raise SystemExit(f"--rcm={checkout} holds no rcm/networks/wan2pt1_jvp.py: give a clone of NVlabs/rcm")
    sys.path.insert(0, str(checkout))
    _stand_in_for_what_is_not_used()
    from rcm.networks.wan2pt1 import WanModel
    from rcm.networks.wan2pt1_jvp import WanModel_JVP
    from rcm.utils.selective_activation_checkpoint import SACConfig

    def create(kind: Any) -> Any:
        network = kind(**WAN, sac_config=SACConfig(mode="block_wise")).to("cuda", torch.bfloat16)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        return network

    return create(WanModel), create(WanModel_JVP), create(WanModel)


def _stand_in_for_what_is_not_used() -> None:
    """Modules that the networks import: logging and process groups, which are not used here, and flash_attn.

    Of flash_attn only the rotation of queries and keys is used. Where it is not installed, a function that
    torch.compile makes one kernel of stands in for it.
    """
    utils = types.ModuleType("imaginaire.utils")
    utils.log = types.SimpleNamespace(info=print, debug=print)
    utils.distributed = None
    sys.modules.update({"imaginaire": types.ModuleType("imaginaire"), "imaginaire.utils": utils})
    with contextlib.suppress(ImportError):
        import flash_attn  # noqa: F401

        return
    names = ("flash_attn", "flash_attn.layers", "flash_attn.layers.rotary", "flash_attn.flash_attn_interface")
    modules = {name: types.ModuleType(name) for name in names}
    modules["flash_attn.layers.rotary"].apply_rotary_emb = _rotation()
    interface = modules["flash_attn.flash_attn_interface"]
    interface._flash_attn_backward = interface._flash_attn_varlen_backward = None
    sys.modules.update(modules)


def _rotation() -> Callable[..., Any]:
    import torch

    @torch.compile
    def rotate(x_BLNH: Any, cos_LK: Any, sin_LK: Any) -> Any:
        cos, sin, even, odd = cos_LK[:, None], sin_LK[:, None], x_BLNH[..., ::2], x_BLNH[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    return lambda x_BLNH, cos_LK, sin_LK, interleaved, inplace: rotate(x_BLNH, cos_LK, sin_LK)


if __name__ == "__main__":
    main()
