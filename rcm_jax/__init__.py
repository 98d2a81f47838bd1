"""rcm_jax: distil video and image diffusion models into one- to four-step generators."""
