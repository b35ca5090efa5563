"""One rank of a replica: requests in, tokens out. All ranks of the replica call `step` in lockstep."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from shoal.parallel.groups import ParallelGroups
from shoal.parallel.kv_transport import KVChunk, KVTransport
from shoal.parallel.request_id import RequestId

from ..kv_cache.transfer import Clock, KVExporter, KVLoader, PlannedWrite
from ..request_limits import RequestLimits, check_request, max_output_tokens
from ..sampling.device_sampler import DeviceSampler
from ..sampling.sampler import SampledToken, Sampler, resolve_seed
from ..scheduling.batch import EMPTY_BATCH, Batch, ScheduledSequence
from ..scheduling.block_manager import BlockManager
from ..scheduling.scheduler import Scheduler, SchedulerConfig
from ..scheduling.sequence import Sequence
from ..tokenization.tokenizer import Tokenizer, read_eos_token_ids
from ..types import EngineOutput, GeneratedTokens, PromptLoaded, Request
from .config import EngineConfig
from .model_loading import OnPhase, load_model
from .model_runner import prompt_slices
from .output_processor import Completion, OutputProcessor, RequestState
from .step import InFlight, Round, Running, StepResult

TRANSFER_TIMEOUT_S = 30.0
"""The longest wait for news of a prompt that another replica computes; then it is computed here."""
EXPORT_LEASE_S = 600.0
"""How long a computed prompt is held for a replica that never says that it has read it."""


class Engine:
    """Schedules, runs, samples and updates. Only leaders (tp rank 0) hold requests; the others follow their batches."""

    def __init__(
        self,
        model_dir: str | Path,
        config: EngineConfig,
        groups: ParallelGroups,
        *,
        transport: KVTransport | None = None,
        clock: Clock = time.monotonic,
        on_phase: OnPhase = lambda _: None,
    ) -> None:
        """Loads this rank's part of the weights; raises ValueError for a checkpoint or a setting that cannot work.

        `transport` brings cache records from and to other replicas; without it, requests begin and end here.
        """
        loaded = load_model(model_dir, config, groups, on_phase)
        self.groups = groups
        self.model_config, self.max_model_len = loaded.config, loaded.max_model_len
        self.runner = loaded.runner
        cache = loaded.runner.cache
        self.block_manager = BlockManager(
            cache.num_blocks,
            cache.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            fingerprint=loaded.record_fingerprint,
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_chunk_size=config.max_chunk_size,
                max_export_tokens=max(1, config.kv_buffer_size // cache.bytes_per_token),
            ),
            self.block_manager,
        )
        self.exporter: KVExporter | None = None
        self.loader: KVLoader | None = None
        if transport is not None and self.is_leader:
            self.exporter = KVExporter(
                transport,
                cache,
                self.scheduler,
                fingerprint=loaded.record_fingerprint,
                chunk_tokens=config.max_num_batched_tokens,
                lease_s=EXPORT_LEASE_S,
                clock=clock,
            )
            self.loader = KVLoader(
                transport,
                self.scheduler,
                fingerprint=loaded.record_fingerprint,
                bytes_per_token=cache.bytes_per_token,
                max_step_tokens=config.max_num_batched_tokens,
                timeout_s=TRANSFER_TIMEOUT_S,
                clock=clock,
            )
        vocab_size, device = self.model_config.vocab_size, groups.device
        self.sampler = Sampler(vocab_size) if device.type == "cpu" else DeviceSampler(vocab_size, device)
        self._runs_ahead = self.runner.graphs is not None and transport is None
        self._in_flight: InFlight | None = None
        """A step that was started before the one that it follows was finished."""
        tokenizer = Tokenizer.from_pretrained(model_dir)
        self.eos_token_ids = read_eos_token_ids(model_dir) or self.model_config.eos_token_ids
        self.processor = OutputProcessor(tokenizer, self.eos_token_ids)
        self.limits = RequestLimits(vocab_size=self.model_config.vocab_size, max_model_len=self.max_model_len)
        self.seed = config.seed
        self._requests: dict[RequestId, RequestState] = {}
        self._running: dict[int, Running] = {}
        self._awaiting: dict[RequestId, int] = {}
        """Requests whose prompts are computed elsewhere, with the sequence that waits for them."""
        self._loaded: list[PromptLoaded] = []
        """Not told yet: a step that fails tells nothing."""
        self._next_seq_id = 0
        self._num_steps = 0
        self._stop_requested = False
        self._all_idle = True

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        return self.groups.is_leader

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def has_request(self, request_id: RequestId) -> bool:
        """Whether it was added and is not finished."""
        return request_id in self._requests

    def add_request(self, request: Request) -> None:
        """Queue a request (leaders only); ValueError when it cannot be answered or its id is in use."""
        assert self.is_leader, "requests go to the leader of an attention group"
        if request.id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is already running")
        if (error := check_request(request, self.limits)) is not None:
            raise ValueError(error.message)
        seed = resolve_seed(request.params.seed, self.seed, request.index)
        max_tokens = max_output_tokens(request, self.max_model_len)
        state = self.processor.start(request, seed=seed, max_tokens=max_tokens)
        self._requests[request.id] = state
        first, *others = [c for c in state.completions if not c.finished]
        seq = self._sequence(state, first)
        seq.needs_prompt_logits = state.prompt_logprobs is not None  # of one continuation: that is enough
        if request.do_remote_prefill:
            assert self.loader is not None, "there is no transport that could bring records"
            seq.awaits_records = True
            self.loader.expect(request.id, seq)
            self._awaiting[request.id] = seq.seq_id
            others = []  # until the prompt is there: they find it in the prefix cache
        if request.do_remote_decode:
            assert self.exporter is not None, "there is no transport that could take records away"
            seq.exports = True
            self.exporter.begin(request.id, seq)
        self._schedule_sequence(seq, state, first)
        for completion in others:
            self._schedule_sequence(self._sequence(state, completion), state, completion)

    def abort(self, request_id: RequestId) -> None:
        """Drop a request and free its blocks; unknown ids are ignored, as it may just have finished.

        This is also how to let go of the records that it published, once they were read.
        """
        state = self._requests.pop(request_id, None)
        for seq_id in [i for i, r in self._running.items() if r.state is state]:
            self._drop_sequence(seq_id)
        self._awaiting.pop(request_id, None)
        if self.exporter is not None:
            self.exporter.release(request_id)

    def add_chunk(self, chunk: KVChunk) -> None:
        """Records of a request that waits for them were published; ignored when it waits no longer."""
        seq_id = self._awaiting.get(chunk.id)
        if seq_id is not None and self.loader is not None:
            self.loader.add_chunk(seq_id, chunk)

    def end_prefill(self, request_id: RequestId, generated: tuple[GeneratedTokens, ...] | None) -> None:
        """What another replica generated of a request that waits for it, per continuation; None: it failed.

        Then, and when records are missing, the prompt is computed here. Ignored when the request waits no longer.
        """
        seq_id = self._awaiting.get(request_id)
        if seq_id is None or self.loader is None:
            return
        if generated is not None:
            self.processor.extend(self._requests[request_id], generated)
        tokens = list(self._running[seq_id].completion.token_ids)
        self.loader.end_prefill(seq_id, None if generated is None else tokens)

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
        self._running[seq.seq_id] = Running(seq, state, completion)
        self.scheduler.add(seq)

    def _drop_sequence(self, seq_id: int) -> None:
        del self._running[seq_id]
        self.scheduler.abort(seq_id)
        if self.loader is not None:
            self.loader.drop(seq_id)

    def take_outputs(self) -> list[EngineOutput]:
        """What unfinished requests have produced since it was last reported."""
        return [output for state in self._requests.values() for output in self.processor.take_outputs(state)]

    def request_stop(self) -> None:
        """Make every rank of the replica leave its loop at the next step."""
        self._stop_requested = True

    def audit(self) -> list[str]:
        """What is wrong on this rank when no request is in flight; [] when every block is given back."""
        problems = [f"request {request_id} is not finished" for request_id in self._requests]
        try:
            self.block_manager.check_integrity()
        except AssertionError as error:
            problems.append(str(error))
        if held := self.block_manager.num_blocks - self.block_manager.num_free_blocks:
            problems.append(f"{held} blocks are in use")
        if self.scheduler.num_export_tokens:
            problems.append(f"the export buffer holds {self.scheduler.num_export_tokens} tokens")
        for what, end in (("published", self.exporter), ("awaited", self.loader)):
            if end is not None and end.num_requests:
                problems.append(f"records of {end.num_requests} requests are {what}")
        return problems

    def rejoin(self, replaced: Collection[int]) -> None:
        """Go on after a step failed and the groups were joined again, with new processes in the ranks `replaced`.

        The failed step is done again. An attention group with a new rank begins again with all it has, as the records
        of that rank are gone; the others keep their caches.
        """
        self._num_steps, self._all_idle, self._in_flight = 0, True, None
        if self.is_leader and not set(replaced).isdisjoint(self.groups.config.tp_group(self.groups.rank)):
            for seq in self.scheduler.running:
                self.scheduler.preempt(seq.seq_id)
            self.block_manager.clear_prefix_cache()

    # -- the loop ------------------------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """One round: schedule, agree, run, sample, update."""
        self._num_steps += 1
        self.groups.set_step(self._num_steps)
        if self.exporter is not None:
            self.exporter.expire()
        if self._all_idle and self.groups.world.size > 1:
            return self._wake()
        if (started := self._take_in_flight()) is not None:
            outputs, _ = self._complete(started)
            return StepResult(outputs, idle=False, stopped=False)
        reach = self.groups.failpoints.reach
        reach("engine.schedule")
        self._start_loaded()
        batch, arrived = self._schedule() if self.is_leader else (EMPTY_BATCH, [])
        round_ = self._agree(batch)
        self._all_idle = round_.idle
        if round_.stopped or round_.idle:
            return StepResult([], idle=round_.idle, stopped=round_.stopped, loaded=self._take_loaded())
        self._write_records(round_.batch, arrived)
        reach("engine.run")
        take = self._take_prompt_logits if self.is_leader else None
        logits = self.runner.run(round_.batch, round_.num_prompt_slices, take)
        if not self.is_leader:
            return StepResult([], idle=False, stopped=False)
        outputs, chunks = self._complete(self._begin_sampling(batch, logits))
        return StepResult(outputs, idle=False, stopped=False, chunks=chunks, loaded=self._take_loaded())

    def _take_loaded(self) -> list[PromptLoaded]:
        loaded, self._loaded = self._loaded, []
        return loaded

    def _start_loaded(self) -> None:
        """Let requests go on whose prompts arrived, or will not arrive."""
        if self.loader is None:
            return
        loaded = self.loader.advance()
        for one in loaded:
            seq_id = self._awaiting.pop(one.id)
            first, state = self._running[seq_id].completion, self._running[seq_id].state
            if first.finished:
                self._drop_sequence(seq_id)
            for completion in state.completions:
                if completion is not first and not completion.finished:
                    self._schedule_sequence(self._sequence(state, completion), state, completion)
        self._loaded += loaded

    def _schedule(self) -> tuple[Batch, list[PlannedWrite]]:
        """The tokens of this step, and the records that arrived for later ones."""
        batch = self.scheduler.schedule()
        if self.loader is None:
            return batch, []
        arrived = self.loader.plan()
        if self.loader.is_reading:
            self.groups.failpoints.reach("kv.fetch")
        return msgspec.structs.replace(batch, writes=[planned.write for planned in arrived]), arrived

    def _write_records(self, batch: Batch, arrived: list[PlannedWrite]) -> None:
        """Write what arrived into the caches of all ranks of the attention group."""
        cache, tp = self.runner.cache, self.groups.tp
        for number, write in enumerate(batch.writes):
            payload = arrived[number].payload if self.is_leader else None
            if tp.size > 1:
                data = None if payload is None else payload.numpy().tobytes()
                received = tp.broadcast_bytes(data, write.num_bytes, 0, layer=-1, op="engine.records")
                payload = torch.frombuffer(bytearray(received), dtype=torch.uint8) if payload is None else payload
            assert payload is not None
            cache.write_records(cache.slots(write.block_table, write.start, write.end), payload)
            self.groups.failpoints.reach("kv.write")

    def _wake(self) -> StepResult:
        """After a step without work: learn whether there is some now, but do not start on it.

        A rank that starts alone makes its peers wait, and stays a step ahead of them until it runs out of work.
        """
        rows = self.groups.world.all_gather_ints(
            [int(self.has_unfinished), int(self._stop_requested)], layer=-1, op="engine.wake"
        )
        self._all_idle = not any(row[0] for row in rows)
        return StepResult([], idle=self._all_idle, stopped=any(row[1] for row in rows), woke=not self._all_idle)

    def _agree(self, batch: Batch) -> Round:
        """All ranks learn whether anybody has work or wants to stop; followers receive their leader's batch."""
        world, tp = self.groups.world, self.groups.tp
        num_slices = len(prompt_slices(batch))
        if world.size == 1:
            return Round(batch, batch.is_empty, self._stop_requested, num_slices)
        packed = b"" if batch.is_empty else batch.pack()
        own = [len(packed), int(self._stop_requested), num_slices]
        rows = world.all_gather_ints(own, layer=-1, op="engine.agree")
        stopped = any(row[1] for row in rows)
        num_bytes = rows[self.groups.leader_rank][0]
        if num_bytes and tp.size > 1 and not stopped:
            received = tp.broadcast_bytes(packed or None, num_bytes, 0, layer=-1, op="engine.batch")
            batch = batch if self.is_leader else Batch.unpack(received)
        return Round(batch, not any(row[0] for row in rows), stopped, max(row[2] for row in rows))

    def _begin_sampling(self, batch: Batch, logits: Tensor, *, ahead: int = 0) -> InFlight:
        """The next token of every sequence that reached its last one."""
        seq_ids = [s.seq_id for s in batch.sequences if s.sample]
        rows = [self._running[i].completion.row for i in seq_ids]
        return InFlight(batch, seq_ids, self.sampler.begin(logits, rows, ahead=ahead))

    def _complete(self, step: InFlight) -> tuple[list[EngineOutput], list[KVChunk]]:
        """Start the step after it where that is clear, then wait for its tokens; outputs and published chunks."""
        self._in_flight = self._run_ahead(step)
        reach = self.groups.failpoints.reach
        reach("engine.sample")
        if self.loader is not None:
            self.loader.commit()
        running = {seq.seq_id for seq in self.scheduler.running}  # who ended or lost its blocks meanwhile gets no token
        sampled = {i: token for i, token in step.finish().items() if i in running}
        chunks = self._account(step.batch, sampled)
        outputs = self._update(sampled)
        reach("engine.update")
        return outputs, chunks

    def _run_ahead(self, step: InFlight) -> InFlight | None:
        """The step after one whose tokens only the device knows: it has them computed and sampled meanwhile.

        Who has ended by then, or is aborted, was computed in vain; the others get what they would have got.
        """
        if not self._runs_ahead or self._stop_requested or step.sampling.token_ids is None:
            return None
        batch = self.scheduler.schedule_ahead(step.batch)
        if batch is None:
            return None
        self.groups.failpoints.reach("engine.run")
        place = {seq_id: i for i, seq_id in enumerate(step.seq_ids)}
        places = [place[s.seq_id] for s in batch.sequences]
        logits = self.runner.run_ahead(batch, step.sampling.token_ids, places)
        return self._begin_sampling(batch, logits, ahead=1)

    def _take_in_flight(self) -> InFlight | None:
        """The step that was started ahead, if anybody still wants something of it."""
        step, self._in_flight = self._in_flight, None
        wanted = step is not None and not self._stop_requested and any(i in self._running for i in step.seq_ids)
        return step if wanted else None

    def _account(self, batch: Batch, tokens: dict[int, SampledToken]) -> list[KVChunk]:
        """Tell the scheduler what was computed; returns the prompt records that were published of it."""
        for seq_id, token in tokens.items():
            if token.error is not None:
                self.scheduler.finish(seq_id, discard=True)
        self.scheduler.update(batch, {i: token.token_id for i, token in tokens.items()})
        if self.exporter is None:
            return []
        exporting = [r for s in batch.sequences if (r := self._running[s.seq_id]).seq.exports]
        epoch = self.groups.world.epoch
        chunks = [c for r in exporting for c in self.exporter.publish(r.state.request.id, epoch=epoch)]
        if chunks:
            self.groups.failpoints.reach("kv.publish")
        return chunks

    def _update(self, tokens: dict[int, SampledToken]) -> list[EngineOutput]:
        """Append the tokens, drop what is finished or handed over, and collect what there is to report."""
        touched: dict[RequestId, RequestState] = {}
        for seq_id, token in tokens.items():
            running = self._running[seq_id]
            state, completion = running.state, running.completion
            self.processor.append(completion, token)
            touched[state.request.id] = state
            if state.num_cached_tokens is None:
                state.num_cached_tokens = running.seq.num_cached_tokens
            if completion.finished or state.request.do_remote_decode:
                if token.error is None:
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
        if self.exporter is not None and state.request.do_remote_decode:
            if state.finished:
                self.exporter.release(state.request.id)
            else:
                self.exporter.end(state.request.id)

    def _take_prompt_logits(self, seq: ScheduledSequence, position: int, logits: Tensor) -> None:
        """Logits of prompt positions `position..` give the log-probabilities of the tokens after them."""
        state = self._running[seq.seq_id].state
        prompt, k = state.request.prompt_token_ids, state.request.params.prompt_logprobs
        assert k is not None
        assert state.prompt_logprobs is not None
        following = prompt[position + 1 : position + 1 + logits.shape[0]]
        scored = self.sampler.prompt_logprobs(logits[: len(following)], following, k)
        del state.prompt_logprobs[position + 1 :]  # of a step that failed after this, and is done again
        state.prompt_logprobs.extend(self.processor.decoded(token.logprobs or {}) for token in scored)
