"""Data: what is made into records (`digits`, `videos`, `tar_shards`), their files, and how a run reads them."""
