"""Instruments that fail."""

from __future__ import annotations

import logging

import pytest

from shoal.cluster.metrics.instruments import GuardedInstruments, Labels


class Failing:
    """Takes `num_good` values."""

    def __init__(self, num_good: int) -> None:
        self.num_good = num_good
        self.values: list[float] = []

    def add(self, name: str, labels: Labels, amount: float) -> None:
        if len(self.values) == self.num_good:
            raise RuntimeError("the exporter is gone")
        self.values.append(amount)

    set = observe = add


def test_a_failure_is_said_once_and_stays_there(caplog: pytest.LogCaptureFixture) -> None:
    failing, fine = Failing(2), Failing(100)
    with caplog.at_level(logging.ERROR):
        for one in map(GuardedInstruments, (failing, fine)):
            one.add("a_total", ("m",), 1)
            one.set("b", ("m",), 2)
            one.observe("c_seconds", ("m",), 3)
            one.add("a_total", ("m",), 4)
    assert failing.values == [1, 2]
    assert fine.values == [1, 2, 3, 4]
    (record,) = caplog.records
    assert record.getMessage() == "Failing could not take c_seconds: no further metrics go there"
    assert "the exporter is gone" in str(record.exc_info)
