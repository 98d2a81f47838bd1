"""rCM for the low-noise expert of Wan2.2 T2V A14B: RF times below 0.875.

    python -m launch.train --config=configs/wan2_2_t2v_a14b_low.py --workdir=runs/wan2_2_low \
        --config.teacher.path=Wan2.2-T2V-A14B/low_noise_model --config.teacher.negative_path=negative.safetensors \
        --config.data.dir=DIR --config.data.name=FOLDER --config.mesh.fsdp=64

The two experts are distilled one by one. For the high-noise expert add --config.loss.rf_range=0.875,1.0 and its
teacher, high_noise_model: its backward simulation starts from noise, that of the low-noise expert from data noised to
0.875. The consistency loss of the high-noise expert stops at 0.875, where nothing ties its estimates to data but DMD
and the teacher it starts from: --config.stages=dmd:10000 is the careful choice there.

Other hyper-parameters are those of configs/wan2_1_t2v_14b.py. The recipe has not been run: its whole state is built, by
shape, in the tests.
"""

from ml_collections import ConfigDict

from configs import wan2_1_t2v_14b


def get_config() -> ConfigDict:
    """The 14B recipe on one expert's range of times."""
    config = wan2_1_t2v_14b.get_config()
    config.model.preset = "wan2.2-t2v-a14b"
    config.loss.rf_range = (0.0, 0.875)
    return config
