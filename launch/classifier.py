"""Trains the judge of moving-digit videos on the train split's digits: about 3 minutes on two CPU cores.

    python -m launch.classifier [--out rcm_jax/assets/digits_classifier.safetensors]

Training videos are rendered as they are needed and disturbed (sub-pixel shifts, blur, brightness, noise), so that
a generated video is judged by what it shows rather than by how clean it is.
"""

import argparse
import os
from importlib import metadata
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import tqdm
from flax import nnx
from jaxtyping import Array, Float

from rcm_jax.data import digits
from rcm_jax.models import classifier as classifiers

BATCH_SIZE = 128


def disturb(key: jax.Array, video_BTHWC: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """Shifts by up to half a pixel, blurs, dims or brightens, and adds noise: a different amount for each video."""
    keys = iter(jax.random.split(key, 6))
    batch = len(video_BTHWC)

    def uniform(low, high):
        return jax.random.uniform(next(keys), (batch, 1, 1, 1, 1), minval=low, maxval=high)

    blur = uniform(0.0, 0.15)
    for axis in (2, 3):
        video_BTHWC = _filter(video_BTHWC, uniform(-0.5, 0.5), blur, axis)
    noise = uniform(0.0, 0.15) * jax.random.normal(next(keys), video_BTHWC.shape)
    return jnp.clip(video_BTHWC * uniform(0.6, 1.2) + noise, 0, 1)


def _filter(video_BTHWC, shift, blur, axis):
    """Three taps along an axis: linear interpolation at `shift` pixels, and `blur` of each neighbour."""
    pad = [(0, 0)] * 5
    pad[axis] = (1, 1)
    padded = jnp.pad(video_BTHWC, pad)
    before, here, after = (jax.lax.slice_in_dim(padded, k, k + video_BTHWC.shape[axis], axis=axis) for k in range(3))
    lower, upper = blur + jnp.maximum(shift, 0), blur + jnp.maximum(-shift, 0)
    return lower * before + (1 - lower - upper) * here + upper * after


def loss_of(classifier, batch, key):
    said = classifier(disturb(key, batch["video"].astype(jnp.float32) / 255))
    label = optax.softmax_cross_entropy_with_integer_labels
    return (
        label(said.digit_logit_BK, batch["digit"]).mean()
        + label(said.direction_logit_BK, batch["direction"]).mean()
        + jnp.square(said.start_B2 - batch["start"]).mean()
        + jnp.square(said.image_BHW - batch["image"]).mean()
    )


@nnx.jit
def train_step(classifier, optimizer, batch, key):
    loss, gradients = nnx.value_and_grad(loss_of)(classifier, batch, key)
    optimizer.update(classifier, gradients)
    return loss


def draw_batch(random: np.random.RandomState, images: digits.Images, batch_size: int) -> dict[str, np.ndarray]:
    """Renders random digits in random directions from random starts."""
    index = random.randint(len(images.digit_N), size=batch_size)
    direction = random.randint(len(digits.DIRECTIONS), size=batch_size)
    step_B2 = np.array(tuple(digits.DIRECTIONS.values()))[direction]
    start_B2 = digits.draw_starts(random, step_B2)
    return {
        "video": digits.render(images.image_NHW[index], step_B2, start_B2),
        "digit": images.digit_N[index],
        "direction": direction,
        "start": (start_B2 / (digits.SIZE - digits.DIGIT_SIZE)).astype(np.float32),
        "image": (images.image_NHW[index] / 16).astype(np.float32),
    }


def train(steps: int, seed: int = 0) -> classifiers.Classifier:
    images = digits.load_images("train")
    random = np.random.RandomState(seed)
    classifier = classifiers.Classifier(rngs=nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 20, steps)
    optimizer = nnx.Optimizer(classifier, optax.adamw(schedule, weight_decay=0.02), wrt=nnx.Param)
    with tqdm.trange(steps, desc="classifier", disable=None) as bar:
        for step in bar:
            batch = draw_batch(random, images, BATCH_SIZE)
            loss = train_step(classifier, optimizer, batch, jax.random.fold_in(jax.random.key(seed), step))
            if step % 50 == 49:
                bar.set_postfix(loss=f"{loss:.3f}")
    return classifier


if __name__ == "__main__":
    import sys, time
    t=time.time()
    c = train(int(sys.argv[1]))
    print('train', time.time()-t)
    f = jax.jit(lambda s, v: nnx.merge(g, s)(v.astype(jnp.float32)/255))
    g, s = nnx.split(c)
    for split in ("validation","train"):
      for dist in (False, True):
        ok=[];od=[]
        for films in digits.film(digits.load_images(split), views=2, seed=5, chunk=512):
            v = films.video_BTHWC
            if len(v)<512: continue
            if dist: v = np.asarray(disturb(jax.random.key(0), v.astype(np.float32)/255))*255
            j=f(s,v)
            lab=[digits.parse_caption(p) for p in films.prompt]
            ok.append(np.asarray(j.digit_logit_BK).argmax(1)==[l[0] for l in lab]); od.append(np.asarray(j.direction_logit_BK).argmax(1)==[list(digits.DIRECTIONS).index(l[1]) for l in lab])
        print(split, dist, np.mean(ok), np.mean(od))
    v=np.zeros((1000,8,16,16,1),np.uint8); jax.block_until_ready(f(s,v)); t=time.time(); jax.block_until_ready(f(s,v)); print('1000 videos',time.time()-t)
    print(sum(x.size for x in jax.tree.leaves(nnx.state(c,nnx.Param))))
