"""rCM for Wan2.1 T2V 14B at 480p, with the official hyper-parameters.

    python -m launch.train --config=configs/wan2_1_t2v_14b.py --workdir=runs/wan_14b \
        --config.teacher.path=wan2.1_t2v_14b.safetensors --config.teacher.negative_path=negative.safetensors \
        --config.data.dir=DIR --config.data.name=FOLDER --config.mesh.fsdp=64

Data and teacher as in configs/wan2_1_t2v_1_3b.py. The networks are sharded over mesh.fsdp devices.

Hyper-parameters are those of the official code. The recipe has not been run: its whole state is built, by shape, in the
tests.
"""

from ml_collections import ConfigDict

from configs import wan2_1_t2v_1_3b


def get_config() -> ConfigDict:
    """Batch 64, lower rates, one student update in ten, no warm-up, more noise."""
    config = wan2_1_t2v_1_3b.get_config()
    config.model.preset = "wan2.1-t2v-14b"
    config.data.batch_size = 64
    config.optimizer.update({"student_lr": 1e-6, "critic_lr": 1e-7})
    config.loss.update({"tangent_warmup": 0, "student_update_freq": 10, "p_G_mean": 1.5})
    config.checkpoint.every = 250
    config.sampling.sigma_max = 200.0
    return config
