"""docs/settings.md is what the declarations of the settings say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path

import pytest

from shoal.cluster.engine_args import EngineArgs
from shoal.cluster.exit_codes import ExitCode
from shoal.cluster.jobs.config import ChatTemplateKwargs, JobConfig
from shoal.cluster.replica_spec import ReplicaSpec
from shoal.cluster.server.settings import ServeArgs
from shoal.parallel.settings import Declaration, declarations
from shoal.runtime.structured_params import StructuredOutputsParams
from shoal.runtime.types import SamplingParams
from tests.support.tables import write_or_compare

DOCUMENT = Path(__file__).parents[3] / "docs" / "settings.md"

JOB = "Settings of `shoal batch` beside those of the engine."
ENGINE = (
    "Settings of `LLM(..)` and of every command that runs a model. The digest of a job's outputs does not depend on "
    "the layout, the batch sizes, the cache or the number of threads."
)
SERVER = "Settings of `shoal serve` beside those of the engine."
REPLICAS = "Fields of an item of `replicas`; on the command line `--replicas prefill:2:tp=2 --replicas decode:1:dp=8`."
SAMPLING = (
    "Fields of `SamplingParams`, of a row, of a row's `sampling_params`, and of `sampling` in a job file, which has "
    "the defaults of rows that do not set them."
)
FORM = "Fields of `structured_outputs`, of which one is given: [structured-outputs.md](structured-outputs.md)."
CHAT = "Fields of `chat_template_kwargs`, in a job file or in a row."

SECTIONS: list[tuple[str, str, type]] = [
    ("Job", JOB, JobConfig),
    ("Engine", ENGINE, EngineArgs),
    ("Server", SERVER, ServeArgs),
    ("Replicas", REPLICAS, ReplicaSpec),
    ("Sampling", SAMPLING, SamplingParams),
    ("Structured outputs", FORM, StructuredOutputsParams),
    ("Chat template", CHAT, ChatTemplateKwargs),
]


def row(declaration: Declaration) -> str:
    setting = declaration.setting
    if setting.derived is not None:
        default = setting.derived
    elif declaration.default is MISSING:
        default = "to be given"
    elif isinstance(declaration.default, bool | int | float | str):
        default = f"`{str(declaration.default).lower()}`"
    else:
        default = "none"
    cells = (f"`{declaration.name}`", declaration.allowed, default, setting.help)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def document() -> Iterator[str]:
    yield "# Settings"
    yield ""
    yield "A setting has one name everywhere: `max_num_seqs` in Python and in a job file is `--max-num-seqs` on the"
    yield "command line; `-tp`, `-dp` and `-o` are short for `tensor_parallel_size`, `data_parallel_size` and `output`."
    yield "A wrong value is one sentence and exit status 2, before anything starts. `make docs` writes this page from"
    yield "the declarations in the code."
    for title, text, cls in SECTIONS:
        yield from ("", f"## {title}", "", text, "", "| setting | values | default | meaning |", "|---|---|---|---|")
        yield from map(row, declarations(cls).values())
    yield from ("", "## Exit status", "", "| status | meaning |", "|---|---|")
    yield from (f"| {code:d} | {code.meaning} |" for code in ExitCode)


@pytest.mark.docs
def test_the_document_lists_every_setting() -> None:
    write_or_compare(DOCUMENT, "\n".join(document()) + "\n")
