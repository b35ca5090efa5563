"""One engine in this process, without Ray: the reference that clusters are compared with, and the quickest start."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from shoal.kernels.numerics import torch_settings
from shoal.parallel.groups import single_process_groups
from shoal.runtime.engine.step_profile import StepProfile
from shoal.runtime.request_limits import RequestLimits
from shoal.runtime.types import Request, RequestOutput, RequestProgress

from ..engine_args import EngineArgs, read_model_config
from ..environment import default_num_threads, num_cores
from ..supervision.fault import Fault
from ..workers.engine_factory import BUILD_ENGINE, admit, resolve_factory, step_profile
from ..workers.spec import OnPhase, Phase, StartReport
from ..workers.wire import pack_output, unpack_output


class InProcessEngine:
    """The interface of `Router`; the engine works while `poll` runs, on the thread that calls it."""

    def __init__(
        self, args: EngineArgs, *, on_phase: OnPhase | None = None, engine_factory: str = BUILD_ENGINE
    ) -> None:
        """Loads the model; ValueError for a layout of more than one worker."""
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
        self._in_flight: set[str] = set()
        self._outputs: list[RequestOutput] = []
        if on_phase is not None:
            on_phase(Phase("ready", time.monotonic() - start, "; ".join(report.notices)))

    @property
    def limits(self) -> RequestLimits:
        return self._engine.limits

    @property
    def faults(self) -> Sequence[Fault]:
        """Nothing can be lost but everything."""
        return ()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def capacity(self) -> int:
        return self._capacity

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.request_id in self._in_flight:
                raise ValueError(f"request id {request.request_id!r} is already in flight")
            self._in_flight.add(request.request_id)
            if (refused := admit(self._engine, request)) is not None:
                self._outputs.append(refused)

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._in_flight.discard(request_id)
            self._engine.abort(request_id)

    def poll(self, timeout_s: float) -> list[RequestOutput]:
        """Step until there are outputs or `timeout_s` has passed; at once when nothing is in flight."""
        deadline = time.monotonic() + timeout_s
        while not self._outputs and self._in_flight:
            with torch_settings(self._num_threads):
                stepped = self._engine.step()
            self._outputs += [o if o.finished else _snapshot(o) for o in stepped.outputs]
            if time.monotonic() >= deadline:
                break
        outputs = [output for output in self._outputs if output.request_id in self._in_flight]
        self._outputs = []
        self._in_flight.difference_update(output.request_id for output in outputs if output.finished)
        return outputs

    def take_progress(self) -> list[RequestProgress]:
        """What requests that report their progress have generated since the last call."""
        return self._engine.take_progress()

    def take_losses(self) -> dict[str, int]:
        """Nothing: there are no workers to lose."""
        return {}

    def step_profiles(self) -> list[StepProfile]:
        """Step profile of the one rank; the engine must measure its steps."""
        return [step_profile(self._engine)]

    def close(self) -> None:
        """Drop what is in flight."""
        self.abort(sorted(self._in_flight))


def _snapshot(output: RequestOutput) -> RequestOutput:
    """A copy, because the engine goes on adding to an output that is not finished."""
    return unpack_output(pack_output(output))
