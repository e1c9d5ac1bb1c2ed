"""The cost of a checkpoint: TSM ResNet-50 with SGD's momentum, to a folder and to an S3 server on loopback.

Training stands still during the snapshot; hashing and writing run in the background and take at most the processor time
that is printed. Both are related to the default interval of `checkpoint.every_s`. Goal: at most 2 % of it.
"""

import os
import tempfile
import time
from statistics import median

import pyarrow.fs as pafs
import torch
from moto.server import ThreadedMotoServer

from slimray import models, runs
from slimray.tasks.network import Input
from slimray.train.checkpoints import Saver
from slimray.train.methods.method import Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import CheckpointSpec, OptimSpec

TIMES = 9


def main() -> None:
    optim = OptimSpec(lr=0.01, reference_batch=8, epochs=1)
    net = models.build("tsm_resnet50", num_classes=400, num_segments=8)
    replica = PlainReplica(net, Setup(optim, Input(), (8, 3, 224, 224), torch.device("cpu")))
    for parameter in replica.net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    replica.optimizer.step()
    tensors = replica.tensors()
    size = sum(value.nbytes for value in tensors.values()) / 1e6
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    os.environ |= {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
    port = server.get_host_and_port()[1]
    pafs.S3FileSystem(endpoint_override=f"http://127.0.0.1:{port}", allow_bucket_creation=True).create_dir("team")
    bucket = f"s3://team/run?endpoint_override=127.0.0.1:{port}&scheme=http"
    with tempfile.TemporaryDirectory() as folder:
        for where, uri in (("folder", f"{folder}/run"), ("S3", bucket)):
            run = runs.run_at(uri)
            saver = Saver(run, 2, "val/top1", lambda: None)
            stops, works, waits = [], [], []
            for step in range(TIMES):
                start, busy = time.perf_counter(), time.process_time()
                saver.save(tensors, {"progress": {"total_steps": step + 1}, "metrics": {}})
                stops.append(time.perf_counter() - start)
                saver.wait()
                works.append(time.process_time() - busy)
                waits.append(time.perf_counter() - start)
            every = CheckpointSpec().every_s
            print(
                f"{where}, {size:.0f} MB: training stands still {median(stops) * 1e3:.0f} ms (longest "
                f"{max(stops) * 1e3:.0f}), processor {median(works):.2f} s, on storage after {median(waits):.2f} s: "
                f"{100 * median(stops) / every:.3f} % of {every:g} s standing still, {100 * median(works) / every:.2f} "
                f"% with the background's work on one core",
                flush=True,
            )
    server.stop()


if __name__ == "__main__":
    main()
