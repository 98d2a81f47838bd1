"""rCM for Wan2.1 T2V 1.3B at 480p, with the official hyper-parameters.

    python -m launch.train --config=configs/wan2_1_t2v_1_3b.py --workdir=runs/wan_1_3b \
        --config.teacher.path=wan2.1_t2v_1.3b.safetensors --config.teacher.negative_path=negative.safetensors \
        --config.data.dir=DIR --config.data.name=FOLDER

The data are TFDS records of latents (21, 60, 104, 16), umT5 embeddings (512, 4096) and prompts, which launch.precompute
makes of videos, captions or official shards, negative.safetensors among them; the teacher is a checkpoint in any layout
that launch.convert reads. Each device of the mesh's data axis trains on whole videos.

Hyper-parameters are those of the official code. The recipe has not been run: its whole state is built, by shape, in the
tests.
"""

from ml_collections import ConfigDict

from configs import digits_rcm


def get_config() -> ConfigDict:
    """Batch 256, AdamW with b1 = 0, one student update in five, tangent warm-up of 1,000 iterations."""
    config = digits_rcm.get_config()
    config.stages = "rcm:10000"
    config.model.update({"preset": "wan2.1-t2v-1.3b", "dtype": "bfloat16", "remat": "attention"})
    config.teacher.update({"path": "", "guidance": 5.0})
    config.data.update({"name": "wan_480p", "batch_size": 256})
    config.optimizer.update({"student_lr": 2e-6, "critic_lr": 4e-7, "warmup": 100, "decay_from": 0, "decay_to": 0})
    config.loss.update(
        {
            "scm_weight": 100.0,
            # Of dmd2: 0.024 and 0.01 where losses are means over the 2.1 million elements of a latent.
            "gan_weight": 1e5,
            "gan_critic_weight": 2e4,
            "tangent_warmup": 1000,
            "student_update_freq": 5,
            "p_G_mean": 0.7,
            "p_G_std": 1.6,
            "p_D_shift": 5.0,
            "dcm_shift": 5.0,
        }
    )
    config.ema.sigma_rel = 0.1
    config.checkpoint.update({"every": 500, "keep": 3})
    config.log.update({"every": 50, "sample_every": 0})
    config.sampling.update({"sigma_max": 80.0, "mid_times": (1.5, 1.4, 1.0), "teacher_steps": 50, "teacher_shift": 3.0})
    return config
