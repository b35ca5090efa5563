"""`build_processor`: a dataset's rows through an engine, as `ray.data.llm.build_processor` has it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from shoal.parallel.settings import refuse_unknown

from ..engine_args import read_model_config
from .config import EngineProcessorConfig
from .engine_kwargs import runs_apart

if TYPE_CHECKING:
    from ray.data import Dataset

Row = dict[str, Any]
RowFunction = Callable[[Row], Row]

logger = logging.getLogger("shoal.data")


class Processor:
    """Adds the answers of a model to the rows of a dataset. Made by `build_processor`."""

    def __init__(
        self,
        config: EngineProcessorConfig,
        *,
        preprocess: RowFunction | None,
        postprocess: RowFunction | None,
        preprocess_map_kwargs: Mapping[str, Any],
        postprocess_map_kwargs: Mapping[str, Any],
        chat_template_kwargs: Mapping[str, Any],
    ) -> None:
        self.config = config
        self._ray_data = _import_ray_data()
        self._preprocess = preprocess
        self._postprocess = postprocess
        self._preprocess_map_kwargs = preprocess_map_kwargs
        self._postprocess_map_kwargs = postprocess_map_kwargs
        self._chat_template_kwargs = chat_template_kwargs

    def __call__(self, dataset: Dataset) -> Dataset:
        """The dataset with answers; they are computed when it is read."""
        from .columns import restore_types
        from .stage import EngineStage

        if self._preprocess is not None:
            dataset = dataset.map(merged(self._preprocess), **self._preprocess_map_kwargs)
        dataset = dataset.map_batches(
            EngineStage,
            fn_constructor_kwargs={"config": self.config, "chat_template_kwargs": self._chat_template_kwargs},
            batch_format="pyarrow",
            batch_size=self.config.batch_size,
            compute=self._pool(),
            **self._resources(),
        )
        keeps_failed_rows = self.config.should_continue_on_error
        dataset = dataset.map(finished(self._postprocess, keeps_failed_rows), **self._postprocess_map_kwargs)
        if keeps_failed_rows:
            dataset = dataset.map_batches(restore_types, batch_format="pyarrow", batch_size=None)
        return dataset

    def log_input_column_names(self) -> None:
        """Log which columns a dataset needs, or its preprocess function has to make."""
        needs_messages = self.config.chat_template.enabled
        wanted = "messages (in OpenAI's format), prompt (text)" if needs_messages else "prompt (text)"
        logger.info(
            "a row needs one of the columns %s, tokenized_prompt (token ids); it may have sampling_params and "
            "chat_template_kwargs (mappings)",
            wanted,
        )

    def _pool(self) -> Any:
        fewest, most = self.config.pool_size
        return self._ray_data.ActorPoolStrategy(
            min_size=fewest,
            max_size=most,
            max_tasks_in_flight_per_actor=self.config.max_tasks_in_flight_per_actor,
            max_concurrent_calls_per_actor=self.config.max_concurrent_batches,
        )

    def _resources(self) -> dict[str, Any]:
        """What Ray reserves for the actor of an engine; workers of its own have theirs."""
        args = self.config.engine_args
        is_alone = not runs_apart(args)
        return {
            "num_cpus": args.num_threads_per_worker or 1 if is_alone else 1,
            "num_gpus": 1 if is_alone and args.device == "cuda" else None,
            "accelerator_type": self.config.accelerator_type,
            "runtime_env": self.config.runtime_env,
        }


def build_processor(
    config: EngineProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
    builder_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """Build a processor; ValueError for a model or setting that cannot work.

    `preprocess` gets a row and returns columns that are added to it, `postprocess` gets a row with the answer's columns
    and returns the row of the result. The `map_kwargs` are arguments of `Dataset.map` for them. `builder_kwargs` may
    have `chat_template_kwargs`.
    """
    builder_kwargs = builder_kwargs or {}
    refuse_unknown(builder_kwargs, {"chat_template_kwargs"}, "builder_kwargs: ")
    kwargs = config.chat_template.chat_template_kwargs
    if kwargs is None:
        kwargs = builder_kwargs.get("chat_template_kwargs") or {}
    _ = read_model_config(config.engine_args)
    return Processor(
        config,
        preprocess=preprocess,
        postprocess=postprocess,
        preprocess_map_kwargs=preprocess_map_kwargs or {},
        postprocess_map_kwargs=postprocess_map_kwargs or {},
        chat_template_kwargs=kwargs,
    )


def merged(preprocess: RowFunction) -> RowFunction:
    """A function that adds the columns of `preprocess` to a row."""
    return lambda row: row | preprocess(row)


def finished(postprocess: RowFunction | None, keeps_failed_rows: bool) -> RowFunction:
    """A function that makes a row of the result. A row that failed is kept as it is: it has nothing to process."""
    from .columns import ERROR_COLUMN, with_logprobs_by_token

    def finish(row: Row) -> Row:
        row = with_logprobs_by_token(row)
        if postprocess is None or row[ERROR_COLUMN]:
            return row
        result = postprocess(row)
        return result | {ERROR_COLUMN: ""} if keeps_failed_rows else result

    return finish


def _import_ray_data() -> ModuleType:
    try:
        import ray.data
    except ImportError as error:
        raise ValueError(f"Ray Data needs {error.name}, which is not installed: pip install 'shoal[data]'") from error
    return ray.data
