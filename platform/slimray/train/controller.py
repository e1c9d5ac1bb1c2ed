"""Ray Train's controller in the process that launches the training, in place of an actor.

As an actor, the controller is a process that imports torch and everything the training pickles before it requests the
first worker, and it needs a second, detached actor that removes its placement group if it dies. Here the launching
process does both: Ray removes whatever it created when it ends. There is no actor for datasets either, as slimray feeds
them itself (data/pipeline.py). The control loop is Ray Train's own, retries and elasticity included. Reaches into
`ray.train.v2._internal` (Ray is pinned to a minor version); tests/train/test_controller.py covers what it uses.
"""

import asyncio
import os
from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class _Group(WorkerGroup):
    """A worker group whose controller is not an actor."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        """Return the workers' additions to the environment of their node (on a local cluster, the driver's)."""
        if os.environ.get("RAY_ADDRESS"):
            return WorkerGroup._get_worker_runtime_env(custom_runtime_env)
        return dict(custom_runtime_env)

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        """Do as Ray Train does, without the handle of a controller: only `get_all_reported_checkpoints` needs one."""
        pending = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[number] for name, values in train_context_args.items()},
            )
            for number, worker in enumerate(workers)
        ]
        ray.get(pending)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Group


class InProcessTrainer(DataParallelTrainer):
    """A trainer whose `fit` runs the controller in the calling thread. Ctrl-C ends the workers and is re-raised."""

    def _create_default_callbacks(self) -> list[Any]:
        found = super()._create_default_callbacks()
        return [one for one in found if not isinstance(one, PlacementGroupCleanerCallback | DatasetsCallback)]

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Result:
        controller = _Controller(**controller_init_kwargs)
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(controller.run())
        except BaseException:
            group = controller.get_worker_group()
            if group is not None and group.has_started():
                group.abort()
            for task in asyncio.all_tasks(loop):
                task.cancel()
                loop.run_until_complete(asyncio.wait([task]))
            raise
        finally:
            loop.close()
        return controller.get_result()


class Trainer(InProcessTrainer, TorchTrainer):
    """An in-process trainer whose workers form a torch process group."""
