"""The accelerators a run can be planned for: how much memory they have, and how fast they are at best."""

import re
from typing import Any, NamedTuple

from jax.experimental import topologies

from rcm_jax.config import UserError


class Chip(NamedTuple):
    """One device as JAX counts them: memory in GiB, TFLOP/s in bfloat16, GB/s to its memory and to its neighbours.

    `links` is what all its links together bring in at once.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float


GPU_SHARE = 0.95  # what programs may use of a GPU's memory: CUDA and NCCL need some too
JAX_GPU_SHARE = 0.75  # what JAX takes of it unless XLA_CLIENT_MEM_FRACTION is set

# By `device_kind`. TPUs: memory is what libtpu lets a program use; rates are those of cloud.google.com/tpu/docs/v5e and
# its like, where links count in both directions. JAX counts a TPU7x as two devices. GPUs: NVIDIA's data sheets of H100
# SXM and H200 SXM, memory GPU_SHARE of what CUDA reports; links are NVLink, within a host.
CHIPS = {
    "TPU v5 lite": Chip(memory=15.75, flops=197, bandwidth=819, links=200),
    "TPU v5": Chip(memory=95.74, flops=459, bandwidth=2765, links=600),
    "TPU v6 lite": Chip(memory=31.25, flops=918, bandwidth=1638, links=400),
    "TPU7x": Chip(memory=94.75, flops=1153, bandwidth=3690, links=300),
    "NVIDIA H100 80GB HBM3": Chip(memory=75.1, flops=989, bandwidth=3350, links=450),
    "NVIDIA H200": Chip(memory=132.8, flops=989, bandwidth=4800, links=450),
}

GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}

# What XLA asks a Hopper GPU of 132 multiprocessors with CUDA 13 and cuDNN 9.12, as text of its GpuTargetConfigProto.
GPU_TARGET = """
platform_name: "CUDA"
device_description_str: "{kind}"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 12 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""


def topology_devices(topology: str) -> list[Any]:
    """Devices that need not be there: of a slice of TPUs such as "v5p:4x4x4", or of hosts of GPUs such as "h200:8x8".

    libtpu compiles for the ones, JAX's plugin for CUDA for the others.

    Raises UserError for devices that these do not know, or if they are not installed.
    """
    name, _, shape = topology.partition(":")
    try:
        if name in GPUS:
            return _gpus(GPUS[name], shape)
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # JAX raises what libtpu or the plugin, or its absence, causes
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--topology={topology}: {reason}; name a chip and the shape of its slice, as v5e:8x8, v5p:4x4x4, v6e:8x8 "
            'or tpu7x:4x4x4, and install "jax[tpu]"; or a GPU, hosts and GPUs of each, as h100:8x8 or h200:1x8, and '
            'install "jax[cuda13-local]"'
        ) from None


def _gpus(kind: str, shape: str) -> list[Any]:
    """`shape` is "HOSTSxGPUS"; NVLink ends with the host, so each counts as a slice of its own."""
    numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if not numbers:
        raise ValueError(f"{shape!r} is no number of hosts x GPUs of a host")
    chip = CHIPS[kind]
    memory, bandwidth = int(chip.memory / GPU_SHARE * 2**30), int(chip.bandwidth * 1e9)
    target = GPU_TARGET.format(kind=kind, memory=memory, bandwidth=bandwidth)
    topology = "{}x1x{}".format(*numbers.groups())
    described = topologies.get_topology_desc(platform="cuda", target_config=target, topology=topology)
    return list(described.devices)


def chip_of(device: Any) -> Chip:
    """Raises UserError for a device that the table lacks."""
    if device.device_kind not in CHIPS:
        raise UserError(
            f"the peak rates of {device.device_kind!r} are not known: name TPUs or GPUs with --topology, or add the "
            "device to rcm_jax/chips.py"
        )
    return CHIPS[device.device_kind]
