"""Consistency training (sCT) on moving digits: a few-step generator from data alone, no teacher.

python -m launch.train --config=configs/digits_sct.py --workdir=runs/digits_sct

First flow matching, then the consistency loss with the data's own velocities, without guidance. Made for a GPU: hours
on two CPU cores. Its result has not been measured.
"""

from ml_collections import ConfigDict

from configs import digits_teacher


def get_config() -> ConfigDict:
    """The teacher's recipe, half as long, and as much consistency training again."""
    config = digits_teacher.get_config()
    config.stages = "flow_matching:8500,sct:8500"
    config.loss.tangent_warmup = 1000
    return config
