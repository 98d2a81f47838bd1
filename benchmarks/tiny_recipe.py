"""A run of 40 steps on 64 moving digits, with a network that compiles and trains in no time.

`python -m benchmarks.soak` and the tests in tests/faults break it in every way. It needs digits.build(DIR, limit=2) and
the embedding of the empty caption: data.dir and teacher.negative_path name them.
"""

from ml_collections import ConfigDict

from configs import digits_teacher
from rcm_jax.models import wan


def get_config() -> ConfigDict:
    wan.PRESETS["tiny"] = wan.WanConfig(
        dim=48,
        ffn_dim=96,
        heads=2,
        layers=2,
        patch=(4, 8, 8),
        in_channels=1,
        out_channels=1,
        text_dim=32,
        text_length=8,
    )
    config = digits_teacher.get_config()
    config.stages = "flow_matching:40"
    config.model.preset = "tiny"
    config.optimizer.warmup = 2
    config.data.update({"name": "digits/first_2/1.0.0", "batch_size": 8, "in_memory": False})
    config.checkpoint.update({"every": 5, "keep": 10})
    config.log.update({"every": 1, "sample_every": 0})
    return config
