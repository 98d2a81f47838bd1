"""rCM on moving digits: distils the shipped teacher into a one- to four-step generator.

    python -m launch.train --config=configs/digits_rcm.py --workdir=runs/digits_rcm
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The recipe; every value can be changed with --config.KEY=VALUE."""
    return ConfigDict(
        {
            "seed": 0,
            # Comma-separated LOSSES:ITERATIONS; losses are scm, dcm, dmd, flow_matching, and rcm = scm+dmd.
            "stages": "rcm:1200",
            "model": {
                "preset": "digits",
                "dtype": "float32",
                # What the backward pass recomputes: none, block, or attention (all but attention).
                "remat": "none",
            },
            "teacher": {
                "path": "rcm_jax/assets/digits_teacher.safetensors",
                "guidance": 3.0,
                # safetensors with an array `text`; empty: the digits' own embedding of "".
                "negative_path": "",
                # Share of captions replaced by the negative one when a teacher is trained.
                "caption_dropout": 0.1,
            },
            # in_memory decodes the whole data set once, at the start.
            "data": {"name": "digits", "dir": "data", "batch_size": 32, "accumulate": 1, "in_memory": False},
            "optimizer": {
                "student_lr": 2e-4,
                "critic_lr": 2e-4,
                "weight_decay": 0.01,
                "b1": 0.0,
                "b2": 0.999,
                "warmup": 20,
                # Updates between which the rate falls to zero; 0: never.
                "decay_from": 0,
                "decay_to": 0,
            },
            "loss": {
                # None: 100 * sqrt(elements of a latent / 2.1e6), which keeps the official balance with DMD.
                "scm_weight": config_dict.placeholder(float),
                "dmd_weight": 1.0,
                "tangent_warmup": 100,
                "student_update_freq": 2,
                "simulation_steps": 4,
                # TrigFlow times after pi/2 of the backward simulation; empty: drawn from p_D.
                "simulation_times": (),
                # p_G: log-normal noise level of sCM. p_D: uniform RF time, shifted, of DMD.
                "p_G_mean": 0.0,
                "p_G_std": 1.6,
                "p_D_shift": 3.0,
                "dcm_steps": 48,
                "dcm_shift": 3.0,
            },
            "ema": {"sigma_rel": 0.1},
            # Devices along each axis; -1 takes all that are left.
            "mesh": {"data": -1, "fsdp": 1},
            "checkpoint": {"every": 500, "keep": 2},
            # wandb: the name of a project, empty for none. sample_every: iterations between samples, 0 for none.
            "log": {"every": 20, "sample_every": 400, "samples": 8, "wandb": ""},
            "sampling": {
                "sigma_max": 80.0,
                # TrigFlow times between the first step and the last.
                "mid_times": (1.3, 1.0, 0.6),
                "teacher_steps": 50,
                "teacher_shift": 3.0,
            },
        }
    )
