"""rCM on moving digits: distils the shipped teacher into a one- to four-step generator.

    python -m launch.train --config=configs/digits_rcm.py --workdir=runs/digits_rcm

About four minutes on two CPU cores. With 4 steps the student reaches a caption accuracy of 0.93 (teacher: 0.95 with 50
guided steps), a Fréchet distance of 11.0 (9.7) and a diversity of 1.06 (1.10) on 640 videos, with seed 0.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The recipe; every value can be changed with --config.KEY=VALUE."""
    config = ConfigDict(
        {
            "seed": 0,
            # On GPUs: the same bits in every run, by slower kernels. A CPU or TPU gives them anyway.
            "deterministic": False,
            # Comma-separated LOSSES:ITERATIONS; losses are scm, dcm, dmd, gan, mean_flow, those that need no teacher,
            # flow_matching, sct and mean_flow_scratch, and the sums rcm = scm+dmd and dmd2 = dmd+gan.
            "stages": "rcm:620",
            "model": {
                "preset": "digits",
                "dtype": "float32",
                # What the backward pass keeps: none (recompute none), linear (attention and matrix products),
                # attention, offload (attention, in the host's memory), or block (each block's input alone).
                "remat": "none",
                # How many of mesh.context's devices exchange heads for tokens; keys go round the others in a ring.
                # 0: as many as the heads of a device divide into.
                "ulysses": 0,
                # Ranks of the LoRA that is then all that the student, or the fake score, learns; 0: all learns.
                "lora_rank": 0,
                "critic_lora_rank": 0,
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
                "student_lr": 5e-5,
                "critic_lr": 5e-5,
                "weight_decay": 0.01,
                "b1": 0.0,
                "b2": 0.999,
                "warmup": 20,
                # Updates between which the rate falls to zero; 0: never.
                "decay_from": 180,
                "decay_to": 340,
            },
            "loss": {
                # sCM's weight beside DMD's, the first thing to tune: more of it keeps diversity, less gains sharpness.
                # None: 100 * sqrt(elements of a latent / 2.1e6), the official balance, here 3.1.
                "scm_weight": config_dict.placeholder(float),
                "dmd_weight": 1.0,
                # Of the GAN, in the student's sum and in the fake score's. The losses beside it are sums over 2,048
                # elements: where those are means, as in DMD2's code, these two are 0.0025 and 0.005.
                "gan_weight": 10.0,
                "gan_critic_weight": 10.0,
                # How sCM differentiates the student: exact, or by differences over `tangent_step`, semicontinuous (in
                # time alone) or discrete (along the path: no derivative of the network at all).
                "tangent": "exact",
                "tangent_step": 1e-4,
                "tangent_warmup": 60,
                "student_update_freq": 2,
                "simulation_steps": 4,
                # TrigFlow times after pi/2 of the backward simulation; empty: drawn from p_D.
                "simulation_times": (),
                # p_G: log-normal noise level of sCM. p_D: uniform RF time, shifted, of DMD.
                "p_G_mean": 0.0,
                "p_G_std": 1.6,
                "p_D_shift": 3.0,
                # RF times that the network is for: one expert of two trains below the boundary, the other above.
                "rf_range": (0.0, 1.0),
                # MeanFlow: the share of samples with an interval, and the power of the weight by the error.
                "mean_flow_share": 0.25,
                "mean_flow_power": 1.0,
                "dcm_steps": 48,
                "dcm_shift": 3.0,
            },
            "ema": {"sigma_rel": 0.1},
            # Networks that lie in the host's memory while they are not used: teacher, ema, or both, comma-separated.
            # The teacher's blocks come to the device one by one.
            "host_memory": "",
            # Devices along each axis; -1 takes all that are left. data and fsdp share out the batch, context a sample's
            # tokens, tensor the heads and widths of layers; all but data share out the parameters.
            "mesh": {"data": -1, "fsdp": 1, "context": 1, "tensor": 1},
            # Kept: the newest `keep`, those at multiples of `keep_every` iterations (0: none), and the one with the
            # lowest value of the metric `best` (empty: none), such as "loss_scm".
            "checkpoint": {"every": 100, "keep": 2, "keep_every": 0, "best": ""},
            # What ends a run, see docs/reliability.md; 0: never.
            "faults": {
                # Seconds without progress; the first iterations compile.
                "hang_seconds": 1800.0,
                # Updates skipped in a row because a gradient was not finite.
                "max_skipped": 10,
                # A loss relative to the largest of its last 100 values.
                "max_loss_ratio": 1000.0,
                # Times a run returns to its last good checkpoint instead, and goes on with other data.
                "rollbacks": 0,
                # Share of records that cannot be read or have a wrong shape, dtype or text.
                "max_bad_data": 0.01,
            },
            # wandb: the name of a project, empty for none. sample_every: iterations between samples, 0 for none.
            "log": {"every": 20, "sample_every": 200, "samples": 8, "wandb": ""},
            "sampling": {
                "sigma_max": 80.0,
                # TrigFlow times between the first step and the last.
                "mid_times": (1.5, 1.4, 1.0),
                "teacher_steps": 50,
                "teacher_shift": 3.0,
            },
        }
    )
    config.loss.scm_weight = 50.0
    return config
