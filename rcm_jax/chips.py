"""The accelerators a run can be planned for: how much memory they have, and how fast they are at best."""

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


# By `device_kind`. TPUs: memory is what libtpu lets a program use; rates are those of cloud.google.com/tpu/docs/v5e and
# its like, where links count in both directions. JAX counts a TPU7x as two devices. GPUs: NVIDIA's data sheets of H100
# SXM and H200 SXM; links are NVLink, within a host.
CHIPS = {
    "TPU v5 lite": Chip(memory=15.75, flops=197, bandwidth=819, links=200),
    "TPU v5": Chip(memory=95.74, flops=459, bandwidth=2765, links=600),
    "TPU v6 lite": Chip(memory=31.25, flops=918, bandwidth=1638, links=400),
    "TPU7x": Chip(memory=94.75, flops=1153, bandwidth=3690, links=300),
    "NVIDIA H100 80GB HBM3": Chip(memory=79.6, flops=989, bandwidth=3350, links=450),
    "NVIDIA H200": Chip(memory=139.8, flops=989, bandwidth=4800, links=450),
}


def topology_devices(topology: str) -> list[Any]:
    """The devices of a slice of TPUs such as "v5p:4x4x4", which need not be there: libtpu can compile for them.

    Raises UserError for a slice that libtpu does not know, or if there is no libtpu.
    """
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # JAX raises what libtpu, or its absence, causes
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--topology={topology}: {reason}; name a chip and the shape of its slice, as v5e:8x8, v5p:4x4x4, v6e:8x8 "
            'or tpu7x:4x4x4, and install "jax[tpu]"'
        ) from None


def chip_of(device: Any) -> Chip:
    """Raises UserError for a device that the table lacks."""
    if device.device_kind not in CHIPS:
        raise UserError(
            f"the peak rates of {device.device_kind!r} are not known: name a slice of TPUs with --topology, or add the "
            "device to rcm_jax/chips.py"
        )
    return CHIPS[device.device_kind]
