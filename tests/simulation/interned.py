"""Parts of a state that are kept once, however many states they are in, and whose steps are taken once."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

from shoal.parallel.config import ParallelConfig
from shoal.parallel.kv_transport import KVChunk
from shoal.parallel.spans import Spans
from shoal.runtime.engine.output_processor import OutputProcessor
from shoal.runtime.scheduling.prefix_index import PrefixNode
from shoal.runtime.scheduling.scheduler import SchedulerConfig
from shoal.runtime.types import Finished, GeneratedTokens, Prefilled, Request, SamplingParams

from .engine import EngineSettings
from .model import Row, Sampler


class Part(Protocol):
    def key(self) -> Hashable:
        """Equal for parts that can go on in the same ways."""
        ...

    def forget(self) -> None:
        """Called on a copy that is not needed any more, so that nothing is left to the garbage collector."""
        ...


P = TypeVar("P", bound=Part)
Result = TypeVar("Result")


class Interned(Generic[P]):
    """Parts by number."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._packed: list[bytes] = []
        self._steps: dict[tuple[Any, ...], tuple[int, Any]] = {}
        self._views: dict[tuple[int, Hashable], Any] = {}
        self.num_steps = 0
        """Steps that were taken and not remembered."""

    def __len__(self) -> int:
        return len(self._packed)

    def add(self, part: P) -> int:
        key = part.key()
        number = self._numbers.setdefault(key, len(self._packed))
        if number == len(self._packed):
            buffer = io.BytesIO()
            _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(part)
            self._packed.append(buffer.getvalue())
        return number

    def step(self, number: int, name: Hashable, act: Callable[[P], Result]) -> tuple[int, Result]:
        """The part that `act` makes of this one, and what it returns; `name` stands for it."""
        known = self._steps.get((number, name))
        if known is None:
            self.num_steps += 1
            part = self._unpack(number)
            result = act(part)
            known = self._steps[number, name] = self.add(part), result
            part.forget()
        return known

    def view(self, number: int, name: Hashable, look: Callable[[P], Result]) -> Result:
        """What there is to see of a part without changing it."""
        if (number, name) not in self._views:
            part = self._unpack(number)
            self._views[number, name] = look(part)
            part.forget()
        result: Result = self._views[number, name]
        return result

    def _unpack(self, number: int) -> P:
        part: P = pickle.loads(self._packed[number])
        return part


_constants: list[Any] = []
_numbers: dict[int, int] = {}
"""Numbers of objects by identity."""


def _constant(value: Any) -> tuple[Any, ...]:
    """All copies share what never changes."""
    if id(value) not in _numbers:
        _numbers[id(value)] = len(_constants)
        _constants.append(value)
    return _constant_of, (_numbers[id(value)],)


def _constant_of(number: int) -> Any:
    return _constants[number]


_CONSTANT = (
    *(Row, EngineSettings, OutputProcessor, Sampler, Spans, ParallelConfig, SchedulerConfig),
    *(KVChunk, GeneratedTokens, PrefixNode, Request, SamplingParams, Prefilled, Finished),
)


class _Pickler(pickle.Pickler):
    dispatch_table = dict.fromkeys(_CONSTANT, _constant)
