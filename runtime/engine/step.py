"""What an engine knows of a step, before, while and after it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.parallel.kv_transport import KVChunk

from ..sampling.sampler import SampledToken, Sampling
from ..scheduling.batch import Batch
from ..scheduling.sequence import Sequence
from ..types import EngineOutput, PromptLoaded
from .output_processor import Completion, RequestState


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence that is being generated, and what it belongs to."""

    seq: Sequence
    state: RequestState
    completion: Completion


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that was started, and what it samples."""

    batch: Batch
    seq_ids: list[int]
    """Of the rows that are sampled."""
    sampling: Sampling

    def finish(self) -> dict[int, SampledToken]:
        return dict(zip(self.seq_ids, self.sampling.finish(), strict=True))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced on this rank."""

    outputs: list[EngineOutput]
    """Reports of requests that ended, and of those that report every step."""
    idle: bool
    """Nobody in the replica had work: nothing was computed."""
    stopped: bool
    """Some rank asked to stop: every rank sees it in the same step and must not call `step` again."""
    woke: bool = False
    """Nobody had work until now and the next step will compute: whoever has more for it should add it first."""
    chunks: list[KVChunk] = field(default_factory=list)
    """Prompt records that were published."""
    loaded: list[PromptLoaded] = field(default_factory=list)
    """Requests that no longer wait for records."""


@dataclass(frozen=True, slots=True)
class Round:
    """What the ranks of a replica agreed on before a step."""

    batch: Batch
    """Of this rank's attention group."""
    idle: bool
    stopped: bool
    num_prompt_slices: int
    """The most that any attention group has in this step; every rank takes part in so many."""
