"""DMD alone on moving digits: the reverse-divergence half of rCM, no consistency loss.

    python -m launch.train --config=configs/digits_dmd.py --workdir=runs/digits_dmd

Fixed simulation times, as DMD2 has them: --config.loss.simulation_times=1.3,1.0,0.6

About five minutes on two CPU cores. The most accurate of the three methods and the least diverse: see the table in the
README.
"""

from ml_collections import ConfigDict

from configs import digits_rcm


def get_config() -> ConfigDict:
    """The rCM recipe with its second loss alone, for about the same number of network evaluations."""
    config = digits_rcm.get_config()
    config.stages = "dmd:926"
    config.optimizer.update({"decay_from": 240, "decay_to": 463})
    return config
