"""KoGPT (GPT-J architecture) inference in JAX: `KoGPT` loads, continues and scores; `kogpt` does it as a command."""

import importlib
from typing import TYPE_CHECKING, Any

from kogpt_jax._version import __version__
from kogpt_jax.errors import InputError

if TYPE_CHECKING:
    from kogpt_jax.config import DEMO, KOGPT_6B, ModelConfig
    from kogpt_jax.engine import Completion, KoGPT, Score, StreamEvent, Usage
    from kogpt_jax.sampling import SamplingParams

# Imported at the first use (PEP 562): JAX takes a second to import, and `kogpt --help` does not need it.
_MODULES = {
    "DEMO": "config",
    "KOGPT_6B": "config",
    "ModelConfig": "config",
    "Completion": "engine",
    "KoGPT": "engine",
    "Score": "engine",
    "StreamEvent": "engine",
    "Usage": "engine",
    "SamplingParams": "sampling",
}

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
