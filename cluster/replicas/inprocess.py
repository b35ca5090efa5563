"""One engine in this process, without Ray: the reference for clusters, and the quickest start."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from shoal.kernels.numerics import torch_settings
from shoal.parallel.groups import single_process_groups
from shoal.parallel.request_id import RequestId
from shoal.runtime.engine.stats import EngineStats
from shoal.runtime.engine.step_profile import StepProfile
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.response import ResponseAssembler
from shoal.runtime.types import REPORT_INTERVAL_S, EngineOutput, Request, RequestOutput

from ..engine_args import EngineArgs, read_model_config
from ..environment import default_num_threads, num_cores
from ..supervision.fault import Fault
from ..workers.engine_factory import BUILD_ENGINE, admit, resolve_factory, step_profile
from ..workers.spec import OnPhase, Phase, StartReport


class InProcessEngine:
    """An engine client with the interface of `ReplicaPool`; the engine runs inside `poll`, on the calling thread."""

    def __init__(
        self, args: EngineArgs, *, on_phase: OnPhase | None = None, engine_factory: str = BUILD_ENGINE
    ) -> None:
        """Load the model; ValueError for a layout of more than one worker."""
        if args.num_workers != 1:
            raise ValueError(
                f"the in-process executor runs one worker, but the layout has {args.num_workers} "
                f"(tensor_parallel_size x data_parallel_size x replicas); use the ray executor"
            )
        _ = read_model_config(args)
        start = time.monotonic()
        self._num_threads = args.num_threads_per_worker or default_num_threads(num_cores())
        report = StartReport()
        groups = single_process_groups(torch.device(args.device))
        with torch_settings(self._num_threads):
            self._engine = resolve_factory(engine_factory)(args, groups, report, None)
        self._capacity = 2 * args.max_num_seqs
        self._responses: dict[str, ResponseAssembler] = {}
        """Answers so far of the requests in flight."""
        self._outputs: list[EngineOutput | RequestOutput] = []
        self._reported_at = 0.0
        if on_phase is not None:
            on_phase(Phase("ready", time.monotonic() - start, "; ".join(report.notices)))

    @property
    def limits(self) -> RequestLimits:
        return self._engine.limits

    @property
    def faults(self) -> Sequence[Fault]:
        """Always empty: there is no worker process that could be lost."""
        return ()

    @property
    def num_in_flight(self) -> int:
        num_unread = sum(isinstance(output, RequestOutput) for output in self._outputs)
        return len(self._responses) + num_unread

    @property
    def capacity(self) -> int:
        return self._capacity

    def stats(self) -> dict[str, EngineStats]:
        """Counters of the one engine."""
        return {"mixed:0": self._engine.stats()}

    def submit(self, requests: Sequence[Request]) -> None:
        """Add requests to the engine; ValueError for an id that is in use."""
        for request in requests:
            if request.request_id in self._responses:
                raise ValueError(f"request id {request.request_id!r} is already in flight")
            self._responses[request.request_id] = ResponseAssembler(request)
            self._take(admit(self._engine, request))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; no further outputs are returned for them. Unknown ids are ignored."""
        for request_id in request_ids:
            if self._responses.pop(request_id, None) is not None:
                self._engine.abort(RequestId(request_id))
        dropped = set(request_ids)
        self._outputs = [output for output in self._outputs if output.request_id not in dropped]

    def poll(self, timeout_s: float) -> list[EngineOutput | RequestOutput]:
        """Step until there are outputs or `timeout_s` has passed; returns at once when nothing is in flight."""
        deadline = time.monotonic() + timeout_s
        while not self._outputs and self._responses:
            with torch_settings(self._num_threads):
                stepped = self._engine.step()
            self._take(stepped.outputs)
            now = time.monotonic()
            if now - self._reported_at >= REPORT_INTERVAL_S:
                self._reported_at = now
                self._take(self._engine.take_outputs())
            if now >= deadline:
                break
        outputs = self._outputs
        self._outputs = []
        return outputs

    def _take(self, outputs: Sequence[EngineOutput]) -> None:
        """Add outputs to the answers; queue the new parts and the whole answers of finished requests."""
        for output in outputs:
            response = self._responses[output.request_id]
            if (new := response.add(output)) is not None:
                self._outputs.append(new)
            if response.finished:
                del self._responses[output.request_id]
                self._outputs.append(response.output())

    def take_losses(self) -> dict[str, int]:
        """Always empty: there are no workers to lose."""
        return {}

    def step_profiles(self) -> list[StepProfile]:
        """Step profile of the one rank; the engine must measure its steps."""
        return [step_profile(self._engine)]

    def close(self) -> None:
        """Drop the requests in flight."""
        self.abort(sorted(self._responses))
