"""What a reader needs to judge a measured figure, and the file that holds both (`kogpt_jax.environment`)."""

from kogpt_jax.environment import environment, write_result

__all__ = ["environment", "write_result"]
