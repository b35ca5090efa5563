"""What an engine knows about a step that it launched, and what a step returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from shoal.parallel.kv_transport import KVChunk

from ..sampling.sampler import SampledToken, Sampling
from ..scheduling.batch import Batch
from ..scheduling.sequence import Sequence
from ..types import EngineOutput, PromptLoaded
from .output_processor import Completion, RequestState


@dataclass(frozen=True, slots=True)
class RunningSequence:
    """A sequence that is being generated, with the request and the continuation it belongs to."""

    seq: Sequence
    state: RequestState
    completion: Completion


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step whose kernels were launched and whose tokens were not read yet."""

    batch: Batch
    sampling: Sampling | None
    """None on followers, which do not sample."""

    @property
    def seq_ids(self) -> list[int]:
        """The sequences that are sampled, in order of the logits' rows."""
        return [s.seq_id for s in self.batch.sequences if s.num_logits]

    def finish(self) -> dict[int, list[SampledToken]]:
        """Wait for the tokens of each sequence that is sampled, `num_logits` of them."""
        assert self.sampling is not None
        tokens = iter(self.sampling.finish())
        return {s.seq_id: list(islice(tokens, s.num_logits)) for s in self.batch.sequences if s.num_logits}


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced on this rank."""

    outputs: list[EngineOutput] = field(default_factory=list)
    """Reports of requests that ended, and of those that report every step."""
    idle: bool = False
    """No rank of the replica had work: nothing was computed."""
    stopped: bool = False
    """Some rank asked to stop: every rank sees it in the same step and must not call `step` again."""
    woke: bool = False
    """The replica was idle and the next step will run; add any further requests now so that they join it."""
    chunks: list[KVChunk] = field(default_factory=list)
    """Chunks of prompts that were published."""
    loaded: list[PromptLoaded] = field(default_factory=list)
    """Requests that no longer wait for a remote prefill."""
