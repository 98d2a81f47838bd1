"""dCM alone on moving digits: the consistency loss between neighbours of a grid of 48 times.

python -m launch.train --config=configs/digits_dcm.py --workdir=runs/digits_dcm

About three minutes on two CPU cores. Its result has not been measured.
"""

from ml_collections import ConfigDict

from configs import digits_rcm


def get_config() -> ConfigDict:
    """The rCM recipe with the discrete consistency loss alone."""
    config = digits_rcm.get_config()
    config.stages = "dcm:860"
    config.optimizer.update({"decay_from": 430, "decay_to": 860})
    return config
