"""The internals of Ray Train that slimray uses to run its controller without an actor exist unchanged."""

import inspect

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from slimray.train import controller


def names(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_methods_that_are_replaced_are_called_with_what_they_are_written_for():
    ours, theirs = controller._Group, WorkerGroup
    for name in ("_init_train_context_on_workers", "_get_worker_runtime_env"):
        assert names(getattr(ours, name)) == names(getattr(theirs, name))
    assert isinstance(inspect.getattr_static(theirs, "_get_worker_runtime_env"), staticmethod)
    assert TrainController.worker_group_cls is WorkerGroup
    for name in ("_initialize_and_run_controller", "_create_default_callbacks"):
        assert callable(getattr(DataParallelTrainer, name))
    assert {"get_worker_group", "get_result"} <= set(dir(TrainController))
    assert inspect.iscoroutinefunction(TrainController.run)


def test_workers_are_told_all_that_ray_train_tells_them():
    told = inspect.getsource(WorkerGroup._init_train_context_on_workers)
    ours = inspect.getsource(controller._Group._init_train_context_on_workers)
    known = names(RayTrainWorker.init_train_context)
    for name in known:
        assert (f"{name}=" in told) == (f"{name}=" in ours), name
    assert "controller_actor" in known
    assert "_decorate_worker_log_file_paths" in told


def test_the_actors_that_are_left_out_are_those_of_callbacks_that_ray_train_makes():
    source = inspect.getsource(DataParallelTrainer._create_default_callbacks)
    for callback in (PlacementGroupCleanerCallback, DatasetsCallback):
        assert f"{callback.__name__}(" in source
    assert inspect.signature(RayTrainWorker.init_train_context).parameters["dataset_shard_provider"].default is None
