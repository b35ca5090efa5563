"""A batch job without a model: engines that answer from a hash of the prompt. Also a program, to be killed."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.cluster.jobs.engine_client import EngineClient
from shoal.cluster.jobs.job import JobSpec, run_job
from shoal.cluster.jobs.progress import ProgressReporter
from shoal.cluster.jobs.stop_signal import StopSignal
from shoal.cluster.openai.chat_options import ChatOptions
from shoal.cluster.openai.requests import RequestDefaults
from shoal.cluster.supervision.fault import Fault
from shoal.parallel.failpoints import DRIVER, VARIABLE, Failpoints
from shoal.parallel.request_id import RequestId
from shoal.runtime.chat.prompt import ChatPrompt
from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.types import (
    CompletionOutput,
    EngineOutput,
    GeneratedTokens,
    Logprob,
    Request,
    RequestOutput,
    Tokens,
)
from tests.support.batch_input import job_input

VOCAB_SIZE = 512
MAX_MODEL_LEN = 128


class ByteEncoder:
    """Byte b is token 3 + b, a prompt starts with token 0, a message with token 1 and an answer with 2."""

    def encode_text(self, text: str) -> ChatPrompt:
        return ChatPrompt([0, *(3 + b for b in text.encode())])

    def encode_chat(self, messages: list[dict[str, Any]], options: ChatOptions) -> ChatPrompt:
        ids = [0]
        for i, message in enumerate(messages):
            if message["role"] not in ("system", "user", "assistant"):
                raise ValueError(f"messages[{i}]: role must be system, user or assistant, got {message['role']!r}")
            if not isinstance(message.get("content"), str):
                raise ValueError(f"messages[{i}]: content must be a string")
            ids += [1, *(3 + b for b in message["content"].encode())]
        return ChatPrompt([*ids, 300 if options.thinking else 301])


RULES = RequestDefaults(limits=RequestLimits(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN), encoder=ByteEncoder())


def answer(request: Request) -> RequestOutput:
    """Tokens and logprobs that depend on the request alone."""
    outputs = []
    for index in range(request.params.n):
        seed = repr((request.prompt_token_ids, request.params.seed, request.index, index))
        tokens = list(hashlib.sha256(seed.encode()).digest()[: min(request.params.max_tokens or 8, 8)])
        logprobs = []
        for token in tokens:
            position = {token: Logprob(-token / 7.0, 1, chr(97 + token % 26))}
            for rank in range(2, 2 + (request.params.logprobs or 0)):
                position[token + rank] = Logprob(-token / 7.0 - rank, rank, None)
            logprobs.append(position)
        outputs.append(
            CompletionOutput(
                index=index,
                text="".join(chr(97 + token % 26) for token in tokens),
                token_ids=tokens,
                cumulative_logprob=-sum(tokens) / 7.0,
                logprobs=logprobs,
                finish_reason="length",
            )
        )
    return RequestOutput(
        request_id=request.request_id,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=outputs,
        finished=True,
        num_cached_tokens=random.randrange(9),
    )


def tokens_of(output: CompletionOutput, start: int, end: int) -> GeneratedTokens:
    """A part of a continuation, as it is reported while the rest is not there."""
    positions = (output.logprobs or [])[start:end]
    logprobs = tuple({t: Logprob(p.logprob, p.rank) for t, p in position.items()} for position in positions)
    return GeneratedTokens(tuple(output.token_ids[start:end]), logprobs)


class StubEngines:
    """Answers up to `per_poll` requests a poll, in a random order; the others come a token further in it."""

    def __init__(
        self,
        *,
        capacity: int = 32,
        per_poll: int = 8,
        poll_s: float = 0.0,
        reply: Callable[[Request], RequestOutput] = answer,
        on_poll: Callable[[int], None] = lambda count: None,
        limits: RequestLimits = RULES.limits,
    ) -> None:
        self.capacity, self.limits = capacity, limits
        self.closed = False
        self.lost: list[Fault] = []
        self.losses: dict[str, int] = {}
        """What `take_losses` returns next."""
        self.told_losses = False
        self.num_losses: dict[str, int] = {}
        """With how many losses the requests were submitted."""
        self.most_in_flight = 0
        self.submitted: list[str] = []
        self._per_poll, self._poll_s, self._reply, self._on_poll = per_poll, poll_s, reply, on_poll
        self.generated: dict[str, tuple[GeneratedTokens, ...]] = {}
        """What the submitted requests came with."""
        self._waiting: list[Request] = []
        self._told: dict[tuple[str, int], int] = {}
        self._num_polls = 0

    @property
    def faults(self) -> Sequence[Fault]:
        return self.lost

    @property
    def num_in_flight(self) -> int:
        return len(self._waiting)

    def stats(self) -> dict[str, EngineStats]:
        return {"mixed:0": EngineStats(num_running_seqs=self.num_in_flight, num_blocks=4, num_used_blocks=1)}

    def submit(self, requests: list[Request]) -> None:
        self._waiting += requests
        for request in requests:
            if request.num_losses:
                self.num_losses[request.request_id] = request.num_losses
            if request.generated:
                self.generated[request.request_id] = request.generated
            for output, generated in zip(answer(request).outputs, request.generated, strict=False):
                count = len(generated.token_ids)
                assert generated == tokens_of(output, 0, count)
                self._told[request.request_id, output.index] = count
        self.most_in_flight = max(self.most_in_flight, len(self._waiting))
        self.submitted = (self.submitted + [r.request_id for r in requests])[-1000:]

    def poll(self, timeout_s: float) -> list[EngineOutput | RequestOutput]:
        self._num_polls += 1
        self._on_poll(self._num_polls)
        if self._poll_s > 0:
            time.sleep(self._poll_s)
        random.shuffle(self._waiting)
        done, self._waiting = self._waiting[: self._per_poll], self._waiting[self._per_poll :]
        return [*[self._reply(request) for request in done], *self._advance()]

    def take_losses(self) -> dict[str, int]:
        losses, self.losses = self.losses, {}
        return losses

    def _advance(self) -> list[Tokens]:
        """Another token of every sample that is not finished."""
        new = []
        for request in self._waiting:
            for output in answer(request).outputs:
                start = self._told.get((request.request_id, output.index), 0)
                if start + 1 < len(output.token_ids):
                    self._told[request.request_id, output.index] = start + 1
                    part = tokens_of(output, start, start + 1)
                    new.append(
                        Tokens(
                            id=RequestId(request.request_id),
                            sample_index=output.index,
                            start=start,
                            token_ids=part.token_ids,
                            logprobs=part.logprobs,
                        )
                    )
        return new

    def close(self) -> None:
        self.closed = True


class AllowedErrors:
    def __init__(self, limit: int) -> None:
        self.limit = limit

    def allows(self, num_failed: int, num_rows: int) -> bool:
        return num_failed <= self.limit


def make_spec(input_path: Path, output: Path, **changes: Any) -> JobSpec:
    identity: Mapping[str, Any] = {"input": "sha256:0", "seed": 0, "sampling": {"temperature": 0.5}}
    values: dict[str, Any] = {
        "input": job_input(input_path),
        "output": output,
        "identity": identity,
        "rules": RULES,
        "model_name": "stub",
        "stop_at_error_limit": False,
        "error_limit": AllowedErrors(0),
    }
    return JobSpec(**(values | changes))


def main() -> int:
    """`stub_job.py INPUT OUTPUT POLL_SECONDS`: the job's exit status; peak memory in KiB and the digest on stdout."""
    input_path, output, poll_s = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    if len(sys.argv) > 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))

    def on_poll(count: int) -> None:
        if count == 1:
            print("answering", flush=True)

    def start() -> EngineClient:
        engines = {"poll_s": poll_s} if poll_s > 0 else {"capacity": 128, "per_poll": 64}
        return StubEngines(on_poll=on_poll, **engines)

    with StopSignal() as stop:
        spec = make_spec(input_path, output, drain_grace_s=5.0)
        failpoints = Failpoints(os.environ.get(VARIABLE, ""), DRIVER)
        result = run_job(spec, start, stop=stop, progress=ProgressReporter(sys.stderr), failpoints=failpoints)
    print(peak_memory_kib())
    print(result.digest)
    return result.exit_code


def peak_memory_kib() -> int:
    """Peak memory of this program alone: ru_maxrss would start at the size of the process that forked it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    sys.exit(main())
