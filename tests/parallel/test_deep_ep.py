"""DeepEP behind the dispatcher: with the module's surface as a fake, and with the library where it and GPUs are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, Store  # type: ignore[attr-defined]

from shoal.kernels.ops import Ops
from shoal.parallel.collectives import CollectiveError, Communicator, as_process_group
from shoal.parallel.config import ParallelConfig
from shoal.parallel.deep_ep import (
    BufferSizes,
    DeepEPAdapter,
    DeepEPTokenDispatcher,
    deep_ep_dispatcher,
    import_deep_ep,
    interface_of,
    open_adapter,
    slots_per_rank,
)
from shoal.parallel.dispatcher import LocalTokenDispatcher
from shoal.parallel.groups import ParallelGroups, create_groups, init_groups, single_process_groups
from shoal.parallel.placement import ExpertPlacement
from shoal.runtime.engine import model_loading
from shoal.runtime.engine.build import build_engine
from shoal.runtime.engine.config import EngineConfig
from shoal.runtime.models.config import ModelConfig
from tests.support.dispatching import HIDDEN, NUM_EXPERTS, random_inputs, through
from tests.support.fakes.deep_ep import module_with
from tests.support.invariance import Point, Rows, differing, make_model, run_point, run_points_on_rank
from tests.support.ops import CPU_OPS
from tests.support.spawn import run_ranks

INTERFACES = ("EPBuffer", "ElasticBuffer", "Buffer")
PLACEMENTS: dict[str, Callable[[int], ExpertPlacement]] = {
    "contiguous": lambda n: ExpertPlacement.contiguous(NUM_EXPERTS, n),
    "round robin": lambda n: ExpertPlacement.round_robin(NUM_EXPERTS, n),
    "copies": lambda n: ExpertPlacement(NUM_EXPERTS, tuple((5, *range(NUM_EXPERTS)[r::n]) for r in range(n))),
}
CASES = ((1, (3, 1)), (2, (0, 7)), (4, (9, 2)), (6, (40, 0)), (3, (0, 0)))
"""Experts of a token, tokens of each rank."""
MAX_ROWS = 240
POINTS = [Point("dp 2", dp=2), Point("tp 2", tp=2, engine={"max_num_batched_tokens": 24})]


def gloo_backend(store: Store, name: str, rank: int) -> ProcessGroupGloo:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return ProcessGroupGloo(PrefixStore(f"{name}/gloo", store), rank, 2, options)


def gloo_group(store: Store, name: str, rank: int) -> ProcessGroup:
    return as_process_group(gloo_backend(store, name, rank), PrefixStore(f"{name}/torch", store), rank, 2)


def wrong_cases(
    make: Callable[[ExpertPlacement], DeepEPTokenDispatcher], rank: int, device: str = "cpu", hidden: int = HIDDEN
) -> list[str]:
    """Where the bits differ from those of the local dispatcher; the number of cases comes last."""
    local = LocalTokenDispatcher(
        ExpertPlacement.contiguous(NUM_EXPERTS, 1), Ops.choose(torch.device(device)), torch.device(device)
    )
    wrong, count = [], 0
    for placement_name, make_placement in PLACEMENTS.items():
        placement = make_placement(2)
        dispatcher = make(placement)
        for top_k, num_tokens in CASES:
            count += 1
            x, topk_idx, weights = random_inputs(num_tokens[rank], top_k, torch.bfloat16, 10 * count + rank, hidden)
            inputs = (x.to(device), topk_idx.to(device), weights.to(device))
            expected = through(local, list(range(NUM_EXPERTS)), inputs)
            got = through(dispatcher, placement.local_experts(rank), inputs)
            if not torch.equal(got, expected):
                wrong.append(f"{placement_name} top_k={top_k}")
    return [*wrong, str(count)]


def with_fakes(rank: int, store: Store) -> dict[str, list[str]]:
    comm = Communicator(rank, 2)
    results = {}
    for interface in INTERFACES:
        group = gloo_group(store, interface, rank)

        def make(
            placement: ExpertPlacement, interface: str = interface, group: ProcessGroup = group
        ) -> DeepEPTokenDispatcher:
            sizes = BufferSizes(HIDDEN, MAX_ROWS, 2 * slots_per_rank(placement), timeout_s=60.0)
            return DeepEPTokenDispatcher(
                placement,
                comm,
                CPU_OPS,
                lambda: open_adapter(module_with(interface), group, sizes),
                torch.device("cpu"),
            )

        results[interface] = wrong_cases(make, rank)
    return results


def test_every_interface_gives_the_bits_of_local() -> None:
    expected = {interface: [str(len(PLACEMENTS) * len(CASES))] for interface in INTERFACES}
    assert run_ranks(with_fakes, 2) == [expected, expected]


def from_the_settings(rank: int, store: Store) -> list[str]:
    """As an engine on GPUs makes the dispatcher, with gloo where NCCL would be."""
    module = module_with("ElasticBuffer")
    module.__spec__ = ModuleSpec("deep_ep", None)
    sys.modules["deep_ep"] = module
    groups = init_groups(ParallelConfig(data_parallel_size=2), rank, store)
    groups.world._nccl = gloo_backend(store, "world", rank)  # type: ignore[assignment]
    return wrong_cases(
        lambda placement: deep_ep_dispatcher(placement, groups, CPU_OPS, HIDDEN, max_rows=MAX_ROWS), rank
    )


def test_the_replicas_ranks_become_a_group_of_torch() -> None:
    expected = [str(len(PLACEMENTS) * len(CASES))]
    assert run_ranks(from_the_settings, 2) == [expected, expected]


def engines_with_fakes(rank: int, store: Store, model_dir: Path) -> list[list[Rows]]:
    """The rows of an engine whose tokens go through the fake."""
    module, group = module_with("EPBuffer"), gloo_group(store, "engines", rank)

    def dispatcher(
        config: EngineConfig,
        model: ModelConfig,
        groups: ParallelGroups,
        placement: ExpertPlacement,
        ops: Ops,
        dtype: torch.dtype,
    ) -> DeepEPTokenDispatcher:
        max_rows = config.max_num_batched_tokens * model.num_experts_per_tok
        sizes = BufferSizes(model.hidden_size, max_rows, model.n_routed_experts, timeout_s=60.0)
        return DeepEPTokenDispatcher(placement, groups.world, ops, lambda: open_adapter(module, group, sizes))

    model_loading._dispatcher = dispatcher
    return run_points_on_rank(rank, store, [(model_dir, "bfloat16")], POINTS)


def test_an_engine_gives_the_bits_of_one_rank(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "deepseek_v32", "bfloat16")
    expected = run_point(Point("reference"), model_dir, "bfloat16", single_process_groups())
    per_rank = run_ranks(engines_with_fakes, 2, model_dir, timeout_s=600)
    for number, point in enumerate(POINTS):
        rows = {row: value for rank in per_rank for row, value in rank[0][number].items()}
        assert len(rows) == len(expected) == 7, point.name
        assert differing(rows, expected) == [], point.name


def test_it_is_for_bfloat16_between_gpus(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "deepseek_v3", "bfloat16")
    config = EngineConfig(all2all_backend="deepep", num_kv_blocks=4)
    two_ranks = create_groups(ParallelConfig(data_parallel_size=2), 0)
    with pytest.raises(ValueError, match=r"bfloat16 between GPUs, this is torch\.bfloat16 on device cpu: set all2all"):
        build_engine(model_dir, config, two_ranks)
    build_engine(model_dir, config, single_process_groups())  # which exchanges nothing


def test_the_newest_interface_is_taken() -> None:
    assert interface_of(module_with("Buffer")) == "Buffer"
    assert interface_of(module_with("Buffer", "ElasticBuffer")) == "ElasticBuffer"
    assert interface_of(module_with("Buffer", "EPBuffer", "ElasticBuffer")) == "EPBuffer"
    assert interface_of(module_with()) is None


class Alone:
    """A group of one size, for what is checked before anybody is called."""

    def __init__(self, size: int) -> None:
        self.size = lambda: size
        self.rank = lambda: 0

    def barrier(self) -> None:
        raise RuntimeError("rank 1 is gone")


def test_what_deep_ep_refuses_is_said_in_its_words() -> None:
    sizes = BufferSizes(HIDDEN, MAX_ROWS, 6, timeout_s=1.0)
    group: Any = Alone(3)
    with pytest.raises(ValueError, match="cannot connect 3 ranks: Unsupported number of EP ranks: 3"):
        open_adapter(module_with("Buffer"), group, sizes)
    with pytest.raises(CollectiveError, match=r"deep_ep\.EPBuffer cannot connect 3 ranks: rank 1 is gone"):
        open_adapter(module_with("EPBuffer"), group, sizes)


def test_ranks_with_different_numbers_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"6 experts on 4 ranks are \[2, 2, 1, 1\]"):
        slots_per_rank(ExpertPlacement.contiguous(6, 4))


class Stays:
    """An adapter of which everything is on this rank."""

    def dispatch(self, rows: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return rows, experts, None

    def combine(self, y: torch.Tensor, handle: None) -> Callable[[], torch.Tensor]:
        return lambda: y


def test_a_new_epoch_gets_a_new_buffer() -> None:
    opened: list[int] = []
    comm = Communicator()

    def open_one() -> DeepEPAdapter:
        opened.append(comm.epoch)
        return Stays()

    dispatcher = DeepEPTokenDispatcher(ExpertPlacement.contiguous(NUM_EXPERTS, 1), comm, CPU_OPS, open_one)
    assert opened == []
    x, _, weights = random_inputs(4, 2, torch.bfloat16, seed=1)
    topk_idx = torch.tensor([[0, 5], [1, 2], [5, 4], [3, 0]])
    for epoch in (1, 1, 4):
        comm.connect(epoch)
        through(dispatcher, list(range(NUM_EXPERTS)), (x, topk_idx, weights))
    assert opened == [1, 4]


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_a_peer_that_does_not_come_ends_the_epoch(op: str) -> None:
    def times_out(*_: object) -> Any:
        raise RuntimeError("DeepEP error: timeout (dispatch CPU)")

    adapter: Any = Stays()
    setattr(adapter, op, times_out)
    placement = ExpertPlacement.contiguous(NUM_EXPERTS, 1)
    dispatcher = DeepEPTokenDispatcher(placement, Communicator(), CPU_OPS, lambda: adapter)
    inputs = (torch.ones(1, 4).bfloat16(), torch.tensor([[2]]), torch.ones(1, 1))
    with pytest.raises(CollectiveError, match=rf"rank 0 of 1 failed in 'moe\.{op}' \(epoch 0, layer 7\): DeepEP error"):
        through(dispatcher, list(range(NUM_EXPERTS)), inputs, layer=7)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which an installed deep_ep is looked for first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    yield tmp_path
    sys.modules.pop("deep_ep", None)


@pytest.mark.skipif(find_spec("deep_ep") is not None, reason="DeepEP is installed")
def test_a_missing_library_is_an_error_that_says_where_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"all2all_backend deepep needs the module deep_ep, .*not installed: build it"):
        import_deep_ep()


def test_a_broken_library_is_an_error(site: Path) -> None:
    (site / "deep_ep.py").write_text("raise OSError('libnvshmem.so.3: cannot open shared object file')")
    with pytest.raises(ValueError, match=r"cannot be imported: libnvshmem\.so\.3"):
        import_deep_ep()


def test_another_library_of_that_name_is_an_error(site: Path) -> None:
    (site / "deep_ep.py").write_text("version = '1.0.0'")
    with pytest.raises(ValueError, match="none of the interfaces EPBuffer, ElasticBuffer, Buffer"):
        import_deep_ep()


def on_gpus(rank: int, store: Store) -> list[str]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    groups = init_groups(ParallelConfig(data_parallel_size=2), rank, store, device=device)
    ops = Ops.choose(device)
    hidden = 2048

    def make(placement: ExpertPlacement) -> DeepEPTokenDispatcher:
        return deep_ep_dispatcher(placement, groups, ops, hidden, max_rows=MAX_ROWS)

    return wrong_cases(make, rank, str(device), hidden)


@pytest.mark.skipif(find_spec("deep_ep") is None or torch.cuda.device_count() < 2, reason="needs DeepEP and two GPUs")
def test_the_library_gives_the_bits_of_local() -> None:
    expected = [str(len(PLACEMENTS) * len(CASES))]
    assert run_ranks(on_gpus, 2, timeout_s=300.0) == [expected, expected]
