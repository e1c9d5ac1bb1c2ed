"""The step `quantize`: few bits after training, or a form that trains (`finetune`), which a second pass makes whole."""

import json
from typing import Any

from slimray import runs
from slimray.spec import UserError, did_you_mean

FASTER = False  # torch computes rounded numbers as floats; a runtime with int8 kernels may be faster


def check(step: Any, net: Any) -> None:
    """Raise UserError for a layer that `net`, on the meta device, does not have."""
    from slimray.compress.fold import LAYERS

    names = [name for name, module in net.named_modules() if type(module) in LAYERS]
    for name in (*step.keep, *(step.bits if isinstance(step.bits, dict) else ())):
        if name not in names:
            raise UserError(f"{'keep' if name in step.keep else 'bits'}: there is no layer {name!r}"
                            f"{did_you_mean(name, names)}")  # fmt: skip


def run(step: Any, work: Any, folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Quantize the network of `before`; return the stage with the bits of its layers, and what each layer costs."""
    from slimray.verbs import subnets
    from slimray.verbs.compressing import read_network, write_network

    def make(stage: runs.Run) -> None:
        net, model, taken = read_network(before)
        records = model.get("compression", [])
        if records and records[-1]["step"] == "quantize" and records[-1]["form"] == "trained":
            from slimray.compress.quantization import finish

            made, record = finish(net, records[-1])
            model, table = {**model, "compression": records[:-1]}, []
        elif any(record["step"] == "quantize" for record in records):
            raise UserError(f"{folder}: the network is quantized already: leave one of the two steps out")
        else:
            source = work.data.tables[work.spec.train]
            count = min(step.samples, source.num_samples)
            samples = subnets.decode(source, taken["recipe"], count, work.job.seed, True, work.spec.decode_timeout_s)
            exhibits = subnets.Exhibits(samples, work.judged if step.max_loss is not None else ())
            made, record, table = work.on_worker(quantized, before.uri, exhibits, work.job.judge, step, work.metric)
        runs.write_file(stage, "data/sensitivity.json", json.dumps(table).encode())
        write_network(stage, made, model, taken, record)

    stage = work.write(folder, step.model_dump(mode="json"), make)
    record = runs.read_model(stage)[1]["compression"][-1]
    table = json.loads(runs.read_file(stage, "data/sensitivity.json"))
    return stage, {"bits": record["layers"]} | ({"sensitivity": table} if table else {})


def quantized(device: str, uri: str, exhibits: Any, spec: Any, step: Any, metric: str) -> tuple[Any, Any, list[Any]]:
    """Return the network of a run with few bits, on the CPU, its record, and what each layer alone costs, if asked."""
    from slimray.compress import quantization
    from slimray.tasks import TASKS
    from slimray.tasks.network import to_input
    from slimray.verbs import subnets

    judge = subnets.Judge(uri, exhibits, spec, device)
    net, keep = judge.network.net, list(step.keep)
    batches = [to_input(part.numpy(), judge.network.pixels, judge.device) for part in judge.inputs]
    rows: list[quantization.Sensitivity] = []
    if step.max_loss is not None:
        sign = -1.0 if TASKS[judge.network.task].best.better == "lower" else 1.0
        all_bits = 8 if isinstance(step.bits, dict) else step.bits
        rows = quantization.sensitivity(
            net, batches[0][:2], batches, lambda one: sign * judge.metrics_of(one)[metric], all_bits, step.scheme
        )
        keep += [row.layer for row in rows if row.loss > step.max_loss and row.layer not in keep]
    made, record = quantization.prepare(
        net, batches[0][:2], batches, step.bits, step.scheme, keep, trained=step.finetune is not None
    )
    return made.cpu(), record, [vars(row) for row in rows]
