"""sCM alone on moving digits: the forward-divergence half of rCM, no fake score.

python -m launch.train --config=configs/digits_scm.py --workdir=runs/digits_scm

About three minutes on two CPU cores. Diverse, and close to real videos in Fréchet distance, but the least accurate of
the three methods at every number of steps: see the table in the README.
"""

from ml_collections import ConfigDict

from configs import digits_rcm


def get_config() -> ConfigDict:
    """The rCM recipe with its first loss alone, for the same number of network evaluations."""
    config = digits_rcm.get_config()
    config.stages = "scm:860"
    config.optimizer.update({"decay_from": 430, "decay_to": 860})
    return config
