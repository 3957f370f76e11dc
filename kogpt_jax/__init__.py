"""KoGPT (GPT-J architecture) inference in JAX: `KoGPT` loads, continues and scores; `kogpt` is the same as a
command."""

from kogpt_jax._version import __version__
from kogpt_jax.config import DEMO, KOGPT_6B, ModelConfig
from kogpt_jax.engine import Completion, KoGPT, Score, StreamEvent, Usage
from kogpt_jax.errors import InputError
from kogpt_jax.sampling import SamplingParams

__all__ = [
    "DEMO",
    "KOGPT_6B",
    "Completion",
    "InputError",
    "KoGPT",
    "ModelConfig",
    "SamplingParams",
    "Score",
    "StreamEvent",
    "Usage",
    "__version__",
]
