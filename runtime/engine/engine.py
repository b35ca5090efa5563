"""One rank of a replica: requests in, tokens out. All ranks of the replica call `step` in lockstep."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

from torch import Tensor

from shoal.parallel.kv_transport import KVChunk
from shoal.parallel.request_id import RequestId
from shoal.parallel.spans import Spans

from ..kv_cache.transfer import KVTransfer, NoTransfer
from ..request_limits import RequestLimits, check_request, max_output_tokens
from ..sampling.sampler import SampledToken, Sampler, resolve_seed
from ..scheduling.batch import EMPTY_BATCH, Batch, ScheduledSequence
from ..scheduling.scheduler import Scheduler
from ..scheduling.sequence import Sequence
from ..types import EngineOutput, GeneratedTokens, Request
from .lockstep import Lockstep, StepAgreement
from .model_runner import ModelRunner, prompt_slices
from .output_processor import Completion, OutputProcessor, RequestState
from .stats import EngineStats
from .step import LaunchedStep, RunningSequence, StepResult

logger = logging.getLogger("shoal.engine")


class Engine:
    """Schedules, runs, samples and updates. Only leaders (tp rank 0) hold requests; the others follow their batches.

    `build_engine` makes one from a checkpoint; a test or a simulation gives it parts of its own.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        sampler: Sampler,
        processor: OutputProcessor,
        *,
        lockstep: Lockstep,
        limits: RequestLimits,
        kv: KVTransfer | NoTransfer | None = None,
        spans: Spans | None = None,
        seed: int = 0,
        overlap: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`seed`: with a request's index, the seed of requests that have none.

        `overlap`: launch each step before the tokens of the one before it are read, where the sampler leaves them on
        the device. For one rank without KV transfer. `clock`: for the times in `Prefilled`.
        """
        self.runner = runner
        self.scheduler = scheduler
        self.block_manager = scheduler.block_manager
        self.sampler = sampler
        self.processor = processor
        self.lockstep = lockstep
        self.limits = limits
        self.kv = kv or NoTransfer()
        self.spans = spans or Spans()
        self.seed = seed
        self.overlap = overlap
        self._clock = clock
        self._requests: dict[RequestId, RequestState] = {}
        self._running: dict[int, RunningSequence] = {}
        self._next_seq_id = 0
        self._launched: LaunchedStep | None = None
        """The next step, if it was launched ahead."""

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        return self.lockstep.is_leader

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def has_request(self, request_id: RequestId) -> bool:
        """Whether it was added and is not finished."""
        return request_id in self._requests

    def add_request(self, request: Request) -> None:
        """Queue a request (leaders only); ValueError if it cannot be answered or its id is in use."""
        assert self.is_leader, "requests go to the leader of an attention group"
        if request.id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is already running")
        if (error := check_request(request, self.limits)) is not None:
            raise ValueError(error.message)
        seed = resolve_seed(request.params.seed, self.seed, request.index)
        max_tokens = max_output_tokens(request, self.limits.max_model_len)
        state = self.processor.start(request, seed=seed, max_tokens=max_tokens)
        self._requests[request.id] = state
        first, *remaining = [c for c in state.completions if not c.finished]
        seq = self._sequence(state, first)
        seq.needs_prompt_logits = state.prompt_logprobs is not None  # one continuation computes them
        if request.do_remote_prefill:
            self.kv.receive(request.id, seq)
            remaining = []  # scheduled once the prompt is received: they find it in the prefix cache
        if request.do_remote_decode:
            self.kv.send(request.id, seq)
        self._schedule_sequence(seq, state, first)
        for completion in remaining:
            self._schedule_sequence(self._sequence(state, completion), state, completion)

    def abort(self, request_id: RequestId) -> None:
        """Drop a request and free its blocks; unknown ids are ignored, as it may just have finished.

        Also releases what was published of a prompt, once it was read.
        """
        state = self._requests.pop(request_id, None)
        for seq_id in [i for i, r in self._running.items() if r.state is state]:
            self._drop_sequence(seq_id)
        self.kv.drop(request_id)

    def add_chunk(self, chunk: KVChunk) -> None:
        """A chunk of a remote prefill was published; ignored if its request does not wait for it."""
        self.kv.add_chunk(chunk)

    def end_prefill(self, request_id: RequestId, generated: tuple[GeneratedTokens, ...] | None) -> None:
        """A remote prefill ended: what it generated, per continuation, or None if it failed.

        If it failed, or chunks are missing, the prompt is computed here. Ignored if the request does not wait.
        """
        seq_id = self.kv.waiting_sequence(request_id)
        if seq_id is None:
            return
        if generated is not None:
            self.processor.extend(self._requests[request_id], generated)
        tokens = list(self._running[seq_id].completion.token_ids)
        self.kv.end_prefill(request_id, None if generated is None else tokens)

    def take_outputs(self) -> list[EngineOutput]:
        """What unfinished requests have produced since it was last reported."""
        return [output for state in self._requests.values() for output in self.processor.take_outputs(state)]

    def _sequence(self, state: RequestState, completion: Completion) -> Sequence:
        seq = Sequence(
            seq_id=self._next_seq_id,
            prompt_token_ids=list(state.request.prompt_token_ids),
            max_tokens=1 if state.request.do_remote_decode else completion.max_tokens,
            output_token_ids=list(completion.token_ids),
        )
        self._next_seq_id += 1
        return seq

    def _schedule_sequence(self, seq: Sequence, state: RequestState, completion: Completion) -> None:
        self._running[seq.seq_id] = RunningSequence(seq, state, completion)
        self.scheduler.add(seq)

    def _drop_sequence(self, seq_id: int) -> None:
        del self._running[seq_id]
        self.scheduler.abort(seq_id)

    # -- the replica ---------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Make every rank of the replica leave its loop at the next step."""
        self.lockstep.request_stop()

    def audit(self) -> list[str]:
        """What is wrong on this rank when no request is in flight; [] if every block is free again."""
        problems = [f"request {request_id} is not finished" for request_id in self._requests]
        try:
            self.block_manager.check_integrity()
        except AssertionError as error:
            problems.append(str(error))
        if held := self.block_manager.num_blocks - self.block_manager.num_free_blocks:
            problems.append(f"{held} blocks are in use")
        if num_tokens := self.scheduler.transfer_buffer.num_tokens:
            problems.append(f"the transfer buffer holds {num_tokens} tokens")
        return problems + self.kv.audit()

    def stats(self) -> EngineStats:
        """Counters, between two steps."""
        scheduler = self.scheduler
        manager = self.block_manager
        return EngineStats(
            num_running_seqs=scheduler.num_running,
            num_waiting_seqs=scheduler.num_waiting,
            num_blocks=manager.num_blocks,
            num_used_blocks=manager.num_blocks - manager.num_free_blocks,
            num_cached_blocks=manager.num_cached_blocks,
            num_evicted_blocks=scheduler.num_evicted_blocks,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            num_transfer_tokens=scheduler.transfer_buffer.num_tokens,
            num_failed_transfers=self.kv.num_failed,
            num_transferred_bytes=self.kv.num_bytes,
        )

    def rejoin(self, replaced: Collection[int]) -> None:
        """Continue after a step failed and the groups were joined again, with new processes in the ranks `replaced`.

        The failed step is repeated. If this attention group has a new rank, its sequences are computed again, because
        the KV of that rank is lost; the other groups keep their caches.
        """
        self._launched = None
        lost_kv = self.lockstep.rejoin(replaced)
        if lost_kv and self.is_leader:
            logger.info("%d running sequences are computed again after a rank was replaced", self.scheduler.num_running)
            for seq in self.scheduler.running:
                self.scheduler.preempt(seq.seq_id)
            self.block_manager.clear_prefix_cache()

    # -- the loop ------------------------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """Run one step together with the other ranks of the replica."""
        self.lockstep.begin_step()
        with self.spans("engine.step"):
            self.kv.expire()
            return self._step_overlapped() if self.overlap else self._step()

    def _step(self) -> StepResult:
        """Schedule, agree, run, sample, update."""
        agreed = self._schedule()
        if not agreed.runs:
            return self._without_work(agreed)
        return self._finish(self._launch(agreed))

    def _step_overlapped(self) -> StepResult:
        """`_step` n that launches step n + 1 before it reads the tokens of step n, so that the device never waits."""
        current = self._take_launched()
        if current is None:
            agreed = self._schedule()
            if not agreed.runs:
                return self._without_work(agreed)
            current = self._launch(agreed)
        self._launched = self._launch_next(current)
        return self._finish(current)

    def _schedule(self) -> StepAgreement:
        """What the next step computes on this rank, agreed with the others."""
        if self.lockstep.is_asleep:
            return self.lockstep.wake(self.has_unfinished)
        with self.spans("engine.schedule"):
            batch = EMPTY_BATCH
            if self.is_leader:
                self._resume_received()
                batch = Batch(self.scheduler.schedule().sequences, self.kv.plan())
        with self.spans("engine.agree"):
            return self.lockstep.agree(batch, len(prompt_slices(batch)))

    def _without_work(self, agreed: StepAgreement) -> StepResult:
        return StepResult(idle=agreed.idle, stopped=agreed.stopped, woke=agreed.woke, loaded=self.kv.take_resumed())

    def _launch(self, agreed: StepAgreement) -> LaunchedStep:
        """Write the KV that was received, start the model and the sampling."""
        self._write_received(agreed.batch)
        self._note_scheduled(agreed.batch)
        on_prompt_logits = self._take_prompt_logits if self.is_leader else None
        with self.spans("engine.run"):
            logits = self.runner.run(agreed.batch, agreed.num_prompt_slices, on_prompt_logits)
        return self._launch_sampling(agreed.batch, logits) if self.is_leader else LaunchedStep(agreed.batch, None)

    def _launch_next(self, step: LaunchedStep) -> LaunchedStep | None:
        """Launch the step after one whose tokens are only on the device; None if it cannot be scheduled yet.

        Work for sequences that turn out to be finished or aborted is discarded; all others are unaffected.
        """
        if self.lockstep.stop_requested or step.sampling is None or step.sampling.token_ids is None:
            return None
        batch = self.scheduler.schedule_ahead(step.batch)
        if batch is None:
            return None
        row_of = {seq_id: row for row, seq_id in enumerate(step.seq_ids)}
        rows = [row_of[s.seq_id] for s in batch.sequences]
        with self.spans("engine.run"):
            logits = self.runner.run_ahead(batch, step.sampling.token_ids, rows)
        return self._launch_sampling(batch, logits, ahead=1)

    def _take_launched(self) -> LaunchedStep | None:
        """The step that was launched ahead, if any of its sequences still runs."""
        step = self._launched
        self._launched = None
        if step is None or self.lockstep.stop_requested or not any(i in self._running for i in step.seq_ids):
            return None
        return step

    def _launch_sampling(self, batch: Batch, logits: Tensor, *, ahead: int = 0) -> LaunchedStep:
        """Start to sample every sequence whose last known token is in the batch."""
        sampled = [s for s in batch.sequences if s.num_logits]
        assert all(s.num_logits == 1 for s in sampled), "a draft token needs a row with the history before it"
        rows = [self._running[s.seq_id].completion.row for s in sampled]
        with self.spans("engine.launch_sampling"):
            return LaunchedStep(batch, self.sampler.begin(logits, rows, ahead=ahead))

    def _finish(self, step: LaunchedStep) -> StepResult:
        """Wait for the sampled tokens, and update scheduler and requests with them."""
        if step.sampling is None:
            return StepResult()
        self.kv.commit()
        with self.spans("engine.sample"):
            sampled = step.finish()
        with self.spans("engine.update"):
            # a sequence that was finished or preempted meanwhile gets no token
            running = {seq.seq_id for seq in self.scheduler.running}
            tokens = {seq_id: sampled[seq_id] for seq_id in sampled if seq_id in running}
            chunks = self._account(step.batch, tokens)
            outputs = self._update(tokens)
        return StepResult(outputs, chunks=chunks, loaded=self.kv.take_resumed())

    # -- parts of a step -----------------------------------------------------------------------------------------

    def _resume_received(self) -> None:
        """Continue requests whose prompts were received, or whose loads failed."""
        for seq_id in self.kv.resume():
            first = self._running[seq_id].completion
            state = self._running[seq_id].state
            if first.finished:
                self._drop_sequence(seq_id)
            for completion in state.completions:
                if completion is not first and not completion.finished:
                    self._schedule_sequence(self._sequence(state, completion), state, completion)

    def _write_received(self, batch: Batch) -> None:
        """Write the KV that was received into the caches of all ranks of the attention group."""
        cache = self.runner.cache
        for index, write in enumerate(batch.writes):
            with self.spans("kv.write"):
                payload = self.lockstep.share_payload(self.kv.payload(index), write.num_bytes)
                cache.write_kv(cache.slots(write.block_table, write.start, write.end), payload)

    def _note_scheduled(self, batch: Batch) -> None:
        if not self.is_leader:
            return
        for scheduled in batch.sequences:
            state = self._running[scheduled.seq_id].state
            if state.scheduled_at is None:
                state.scheduled_at = self._clock()

    def _account(self, batch: Batch, tokens: dict[int, list[SampledToken]]) -> list[KVChunk]:
        """Update the scheduler; returns the chunks of prompts that were published."""
        for seq_id, sampled in tokens.items():
            if any(token.error is not None for token in sampled):
                self.scheduler.finish(seq_id, discard=True)
        self.scheduler.update(batch, {i: [token.token_id for token in sampled] for i, sampled in tokens.items()})
        scheduled = [self._running[s.seq_id] for s in batch.sequences if s.seq_id in self._running]
        sent = [r.state.request.id for r in scheduled if r.seq.remote_decode]
        return self.kv.publish(sent, epoch=self.lockstep.epoch)

    def _update(self, tokens: dict[int, list[SampledToken]]) -> list[EngineOutput]:
        """Append the tokens, drop what is finished or handed over, and collect what there is to report."""
        touched: dict[RequestId, RequestState] = {}
        for seq_id, sampled in tokens.items():
            running = self._running[seq_id]
            state, completion = running.state, running.completion
            for token in sampled:
                if not completion.finished:  # tokens after the end are dropped
                    self.processor.append(completion, token)
            touched[state.request.id] = state
            if state.num_cached_tokens is None:
                state.num_cached_tokens = running.seq.num_cached_tokens
                state.first_token_at = self._clock()
            if completion.finished or state.request.do_remote_decode:
                if all(token.error is None for token in sampled):
                    self.scheduler.finish(seq_id)
                del self._running[seq_id]
        outputs: list[EngineOutput] = []
        for state in touched.values():
            has_ended = state.finished or state.handed_over
            if has_ended:
                self._remove_request(state)
            if has_ended or state.request.report == "step":
                outputs += self.processor.take_outputs(state)
        return outputs

    def _remove_request(self, state: RequestState) -> None:
        del self._requests[state.request.id]
        if state.request.do_remote_decode:
            self.kv.finish(state.request.id, handed_over=not state.finished)

    def _take_prompt_logits(self, seq: ScheduledSequence, position: int, logits: Tensor) -> None:
        """Score prompt tokens: the logits [n, V] of positions `position..` give those of the tokens after them."""
        state = self._running[seq.seq_id].state
        prompt, k = state.request.prompt_token_ids, state.request.params.prompt_logprobs
        assert k is not None
        assert state.prompt_logprobs is not None
        following = prompt[position + 1 : position + 1 + logits.shape[0]]
        scored = self.sampler.prompt_logprobs(logits[: len(following)], following, k)
        del state.prompt_logprobs[position + 1 :]  # left by a step that failed after this and is repeated
        state.prompt_logprobs.extend(self.processor.decoded(token.logprobs or {}) for token in scored)
