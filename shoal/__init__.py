"""Shoal: inference for the DeepSeek-V3 family whose answers do not depend on the cluster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.cluster.llm import LLM
    from shoal.runtime.structured_params import StructuredOutputsParams
    from shoal.runtime.types import CompletionOutput, Logprob, RequestOutput, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "StructuredOutputsParams"]

_HOME = {
    "LLM": "shoal.cluster.llm",
    "CompletionOutput": "shoal.runtime.types",
    "Logprob": "shoal.runtime.types",
    "RequestOutput": "shoal.runtime.types",
    "SamplingParams": "shoal.runtime.types",
    "StructuredOutputsParams": "shoal.runtime.structured_params",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import shoal` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
