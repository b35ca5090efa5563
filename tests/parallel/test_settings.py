"""Settings read from annotations: which values are allowed, and the words of a refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal

import pytest

from shoal.cluster.bench.workload import Workload
from shoal.cluster.commands.arguments import DemoArgs, EvalArgs, KernelArgs, ThroughputArgs
from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.jobs.config import ChatTemplateKwargs, JobConfig
from shoal.cluster.replica_spec import ReplicaSpec
from shoal.parallel.settings import (
    Declaration,
    Setting,
    build_settings,
    check_settings,
    declarations,
    did_you_mean,
)
from shoal.runtime.types import SamplingParams

SETTINGS = (
    *(ChatTemplateKwargs, DemoArgs, EngineArgs, EvalArgs, JobConfig, KernelArgs),
    *(ReplicaSpec, SamplingParams, ThroughputArgs, Workload),
)


@dataclass(frozen=True, kw_only=True)
class Base:
    inner: Annotated[int, Setting("Inner.", ge=1)] = 1

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class Outer(Base):
    needed: Annotated[str, Setting("The needed one.")]
    unlisted: int = 0


def test_declarations_are_those_of_the_annotations() -> None:
    assert list(declarations(Outer)) == ["needed", "inner"]
    assert declarations(Outer)["needed"].default is MISSING
    assert declarations(Outer)["inner"].setting.help == "Inner."


def test_an_object_is_checked_when_it_is_built() -> None:
    with pytest.raises(ValueError, match="inner must be a whole number of at least 1, got 0"):
        Outer(needed="x", inner=0)
    with pytest.raises(ValueError, match=r"a\.needed is missing; give it \(The needed one\)"):
        build_settings(Outer, {"inner": 2}, "a.")
    with pytest.raises(ValueError, match=r"a\.ineer is not a known setting; did you mean inner\?"):
        build_settings(Outer, {"ineer": 2}, "a.")
    with pytest.raises(ValueError, match=r"5 is not a known setting; known are inner, needed"):
        build_settings(Outer, {5: 2})
    assert build_settings(Outer, {"needed": "x", "inner": 2}) == Outer(needed="x", inner=2)


@pytest.mark.parametrize(
    ("kind", "setting", "allowed", "refused", "words"),
    [
        (int, Setting(""), [0, -(2**63)], [True, 1.0, "1", None, 2**63], "a whole number"),
        (int, Setting("", ge=1, le=4), [1, 4], [0, 5], "a whole number between 1 and 4"),
        (float, Setting("", gt=0, lt=1), [0.5], [0, 1, True, "0.5", None], "a number above 0 and below 1"),
        (float, Setting("", ge=0), [0, 1e300], [float("nan"), float("inf"), -1e-9], "a number of at least 0"),
        (bool, Setting(""), [True, False], [0, 1, "true", None], "true or false"),
        (str, Setting(""), ["x", " "], ["", 5, b"x", ["x"]], "non-empty text"),
        (str, Setting("", is_path=True), ["a/b", "."], ["", " \t", "a\0b", 5], "a path"),
        (Literal["a", "b"], Setting(""), ["a"], ["c", None, ["a"], 1], "one of a, b"),
        (int | None, Setting("", ge=1), [None, 1], [0, "1"], "a whole number of at least 1 or null"),
        (Sequence[int], Setting("", ge=0), [[], [1], (2,)], [[-1], ["1"], "1", 1, [2**63]], "a list of whole numbers"),
        (str | Sequence[str] | None, Setting(""), ["x", ["x"]], [[""], [1], 1], "non-empty text, a list of non-empty"),
        (Mapping[int, float], Setting(""), [{}, {1: 2}], [[], "x", None], "a mapping"),
        (Base, Setting(""), [Base()], [{"inner": 1}, None], "a mapping"),
    ],
)
def test_values(kind: Any, setting: Setting, allowed: list[Any], refused: list[Any], words: str) -> None:
    declaration = Declaration("x", kind, setting, None)
    for value in allowed:
        declaration.check(value)
    for value in refused:
        with pytest.raises(ValueError, match=f"p.x must (be {words}|fit into 64 bits)"):
            declaration.check(value, "p.")


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ValueError, match=r"got 'x{99}\.\.\.$"):
        Declaration("x", int, Setting(""), None).check("x" * 10_000)


def test_hints() -> None:
    assert (
        did_you_mean("tensor-parallel-sise", ["tensor_parallel_size", "seed"]) == "did you mean tensor_parallel_size?"
    )
    assert did_you_mean("zzz", ["b", "a"]) == "known are a, b"


@pytest.mark.parametrize("cls", SETTINGS)
def test_every_default_is_allowed_and_every_help_a_sentence(cls: type) -> None:
    """Values that are the default are not checked when an object is built."""
    for declaration in declarations(cls).values():
        assert declaration.setting.help.endswith("."), declaration.name
        if declaration.default is not MISSING:
            declaration.check(declaration.default)
