"""sCM alone on moving digits: the forward-divergence half of rCM, no fake score.

python -m launch.train --config=configs/digits_scm.py --workdir=runs/digits_scm

About three minutes on two CPU cores. Diverse, but not stable: of three seeds two ended far from real videos
(Fréchet distances of 32 and 85 with 4 steps), one closer than any other method: see the table in the README.
"""

from ml_collections import ConfigDict

from configs import digits_rcm


def get_config() -> ConfigDict:
    """The rCM recipe with its first loss alone, for about the same number of network evaluations."""
    config = digits_rcm.get_config()
    config.stages = "scm:860"
    config.optimizer.update({"decay_from": 430, "decay_to": 860})
    return config
