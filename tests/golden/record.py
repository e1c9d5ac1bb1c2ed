"""Computes the golden values: `python -m tests.golden.record FILE` writes those of the code as it is.

Real prepared samples of each kind (tests/old_runs) go through each training method on 1, 2 and 3 ranks (gloo). Kept
are plans, indexes, samples, losses, the tensors of the checkpoints and what the networks answer. Training in float32
gives digests, for equal machines. These trainings magnify rounding (BatchNorm over two samples), so other machines
compare losses, norms and projections of the same training in float64 (`--double`), except for points, whose operators
compute in float32 whatever they are given.

golden.json was written at commit d4a6aae with `--all`: digests of the one, numbers of the other, and as `spread` how
far they move when the starting weights are off by some roundings (NUDGES). Two corrections of 2026-11-29 changed values
on purpose, which were written again: ranks with a lone sample (on 2 and 3 ranks) no longer double it, and averages of
weights warm up and hold statistics. All other values (on one rank all but those) kept their bits.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import av
import numpy as np
import PIL
import torch
import torch.distributed as dist
from tests.golden import binding
from torch import Tensor, nn

STORAGE = Path(__file__).resolve().parents[1] / "old_runs/storage"
WORLDS, BATCH, PER_WORKER, SEED, STEPS = (1, 2, 3), 8, 2, 5, (1, 2, 3)  # the last batch of the epoch is a short one
SINGLE = ("clouds", "frustums")
NUDGES, TRIES = {torch.float32: 1e-6, torch.float64: 1e-12}, 3  # relative
KINDS = ("clips", "images", "clouds", "frustums")  # prepared datasets, and NAME-net trained on each
SGD = {"lr": 0.02, "reference_batch": BATCH, "epochs": 2}
PLAIN = SGD | {"groups": "plain"}
ADAM = {"lr": 0.002, "reference_batch": BATCH, "epochs": 2, "schedule": "cosine", "groups": "no_norm_decay"}
NETS: dict[str, dict[str, Any]] = {
    "clips": {"name": "tsm_resnet18", "num_classes": 4, "width": 0.0625, "num_segments": 2},
    "images": {"name": "resnet18", "num_classes": 12, "width": 0.0625},
    "clouds": {"name": "pvcnn_s3dis", "num_classes": 11, "in_channels": 3, "width": 0.0625, "voxel": 0.25},
    "frustums": {"name": "frustum_pointnet", "num_classes": 3, "width": 0.0625, "num_points": 32},
}
SUPERNETS: dict[str, dict[str, Any]] = {
    "clips": {"name": "ofa_tsm_mobilenetv3", "num_classes": 4, "preset": "tiny", "width": 0.125, "num_segments": 2},
    "images": {"name": "ofa_mobilenetv3", "num_classes": 12, "preset": "tiny", "width": 0.125},
    "clouds": {"name": "ofa_pvcnn", "num_classes": 11, "preset": "tiny", "in_channels": 3, "width": 0.25, "voxel": 0.5},
}
PATHS = {"name": "proxyless_supernet", "num_classes": 12, "preset": "tiny", "width": 0.125}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {  # dataset, method, model, optim
    "clips plain": ("clips", "plain", NETS["clips"], SGD | {"ema": 0.9}),
    "images plain": ("images", "plain", NETS["images"], SGD | {"groups": "no_norm_decay", "label_smoothing": 0.1}),
    "clouds plain": ("clouds", "plain", NETS["clouds"], ADAM | {"optimizer": "adamw"}),
    "frustums plain": ("frustums", "plain", NETS["frustums"], ADAM | {"optimizer": "adam", "clip_norm": None}),
    **{f"{name} mutual": (name, "mutual", NETS[name], PLAIN | {"mutual": 1.0}) for name in KINDS[:3]},
    **{f"{name} supernet": (name, "supernet", SUPERNETS[name], PLAIN) for name in KINDS[:3]},
    **{f"images paths {name}": ("images", name, PATHS, PLAIN) for name in ("two", "full_v2", "reinforce")},
}
PATHS_KEPT = r"alphas|^baseline|^scores"  # of a thousand tensors; the others are in the digest of all
RENAMED = json.loads(Path(__file__).with_name("names.json").read_text())  # pattern of a name of today -> name then


def machine() -> dict[str, str]:
    """What the bits of a result depend on besides the code; equal machines give equal bits."""
    info = Path("/proc/cpuinfo")
    wanted = ("vendor_id", "cpu family", "model", "model name")
    lines = [line.partition(":") for line in info.read_text().split("\n\n")[0].splitlines()] if info.exists() else []
    found = {key.strip(): value.strip() for key, _, value in lines if key.strip() in wanted}
    return {
        "processor": " ".join(found.get(key, "?") for key in wanted) if found else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pyav": av.__version__,
        "pillow": PIL.__version__,
        "threads": "1",
    }


# --------------------------------------------------------------------------------------------- a tensor in few words


def digest(values: np.ndarray) -> str:
    """Eight hexadecimal digits of type, shape and bits."""
    head = f"{values.dtype} {list(values.shape)} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()[:8]


def describe(values: Tensor | np.ndarray) -> str:
    """Digest, norm and projection (on the cosines of the positions) of an array."""
    array = values.detach().numpy() if isinstance(values, Tensor) else np.asarray(values)
    flat = np.nan_to_num(array.astype(np.float64).ravel(), nan=-7.0)
    projection = float(flat @ np.cos(np.arange(len(flat))))
    return f"{digest(array)} {np.linalg.norm(flat):.6g} {projection:.6g}"


# ------------------------------------------------------------------------------------------------------ what is exact


def plans() -> dict[str, Any]:
    """Orders of passes and what each rank gets of each step."""
    out = {}
    for number, (count, held, every) in enumerate([(26, 0, 0), (23, 6, 2), (7, 0, 0)]):
        for epoch in (0, 3):
            phase = binding.make_phase(count, 5, epoch, held, every)
            steps = range(phase.num_steps)
            slices = {w: [[binding.cuts(phase, s, r, w, 2) for r in range(w)] for s in steps] for w in WORLDS}
            order = binding.order(phase, 4 + number)
            out[f"{count} samples, {held} held, epoch {epoch}"] = {
                "order": order,
                "slices": hashlib.sha256(json.dumps(slices).encode()).hexdigest()[:16],
                "first step": {w: slices[w][0] for w in WORLDS},
            }
    return out


def drawn_archs() -> dict[str, Any]:
    """Archs as spaces draw, change, cross and encode them: digests, and one in full."""
    out = {}
    for name, space in binding.spaces():
        rng = random.Random(1)
        archs = [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(6))]
        archs += [space.mutate(arch, rng, 0.3) for arch in archs] + [space.cross(archs[2], archs[3], rng)]
        plain = [binding.genes(arch) for arch in archs]
        codes = [[round(float(value), 6) for value in space.encode(arch)] for arch in archs]
        whole = json.dumps([plain, codes, space.num_archs()], sort_keys=True)
        out[name] = {"third": plain[2], "digest": hashlib.sha256(whole.encode()).hexdigest()[:16]}
    return out


def indexes() -> dict[str, Any]:
    """The indexes of the prepared datasets, each column as a digest; those that came after the recording left out."""
    out = {}
    for name in KINDS:
        for split in ("train", "val"):
            rows = binding.read_index(STORAGE / name / "data", split)
            names = [key for key in rows[0] if key not in binding.LATER]
            columns = {key: json.dumps([row[key] for row in rows], default=str) for key in names}
            digests = {key: hashlib.sha256(text.encode()).hexdigest()[:16] for key, text in columns.items()}
            out[f"{name} {split}"] = {"rows": len(rows), **digests}
    return out


# ------------------------------------------------------------------------------------------------------------ samples


class Samples:
    """The prepared samples that the cases train on, made once before the ranks are."""

    def __init__(self, name: str):
        folder = STORAGE / name / "data"
        recipe = json.loads((STORAGE / f"{name}-net/model/input.json").read_text())["recipe"]
        self.shape = binding.input_shape(recipe)
        self.train = _load(folder, "train", recipe | {"mode": "train"}, 1)
        self.val = _load(folder, "val", recipe, 0)[0][:4]

    def of(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        data, labels = self.train
        return data[ids], labels[ids]


def _load(folder: Path, split: str, recipe: dict[str, Any], epoch: int) -> tuple[np.ndarray, np.ndarray]:
    rows = binding.read_index(folder, split)[:26]
    found = [binding.load_sample(folder, row, recipe, (SEED, epoch, n)) for n, row in enumerate(rows)]
    return np.stack([data for data, _ in found]), np.stack([np.asarray(label) for _, label in found])


# -------------------------------------------------------------------------------------------------------------- cases


def train(case: str, samples: Samples, rank: int, world: int, nudged: int = 0) -> tuple[list[float], dict[str, Any]]:
    """A case on one rank: the loss of each step, and all tensors by name; with `nudged` weights that are off a bit."""
    _, method, model, optim = CASES[case]
    torch.manual_seed(1)
    net = binding.make_net(model)
    teacher = binding.make_net(model) if method in ("mutual", "supernet") else None
    _nudge(net, nudged)
    training = binding.Training(method, net, teacher, optim, samples.shape, rank, world)
    count = len(samples.train[0])
    phase = binding.make_phase(count, BATCH, 1)
    order, losses = binding.order(phase, SEED), []
    for step in STEPS:
        if step * BATCH >= count:
            break
        num_valid = min(BATCH, count - step * BATCH)
        rate = training.rate(BATCH, count, step * BATCH)
        pieces = [samples.of(order[lo:hi]) for lo, hi in binding.cuts(phase, step, rank, world, PER_WORKER)]
        loss = torch.tensor(training.step(pieces, num_valid, rate, step), dtype=torch.float64)
        if world > 1:
            dist.all_reduce(loss)
        losses.append(float(loss) / num_valid)
    scores = {f"scores.{name}": value for name, value in training.scores(samples.val).items()}
    return losses, {recorded_name(name): value for name, value in (training.tensors() | scores).items()}


def recorded_name(name: str) -> str:
    """The name that a tensor had at d4a6aae."""
    for pattern, then in RENAMED.items():
        name = re.sub(pattern, then, name)
    return name


def _is_kept(case: str, name: str) -> bool:
    """Whether a tensor of a case is recorded on its own."""
    return not name.endswith("num_batches_tracked") and (" paths " not in case or bool(re.search(PATHS_KEPT, name)))


@torch.no_grad()
def _nudge(net: nn.Module, number: int) -> None:
    """Move the weights a bit; `number` says which way, 0 not at all."""
    generator = torch.Generator().manual_seed(number)
    for value in net.parameters() if number else ():
        value.mul_(1 + NUDGES[value.dtype] * torch.randn(value.shape, generator=generator))


def _rank(rank: int, world: int, data: dict[str, Samples], folder: str, double: bool, spread: bool) -> None:
    """One process of `world`: all cases one after another; rank 0 writes what they gave."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    out: dict[str, Any] = {}
    for case, (name, *_) in CASES.items():
        torch.set_default_dtype(torch.float64 if double and name not in SINGLE else torch.float32)
        losses, tensors = train(case, data[name], rank, world)
        kept = {key: value for key, value in tensors.items() if _is_kept(case, key)}
        out[case] = {"losses": losses, "tensors": {key: describe(value) for key, value in kept.items()}}
        whole = "".join(f"{key} {digest(value.detach().numpy())} " for key, value in sorted(tensors.items()))
        out[case]["all"] = hashlib.sha256(whole.encode()).hexdigest()[:16]
        if spread:
            others = [train(case, data[name], rank, world, nudged) for nudged in range(1, TRIES + 1)]
            moved = {key: max(_distance(value, other[key]) for _, other in others) for key, value in kept.items()}
            apart = [
                max(abs(a - b) for b in found) for a, *found in zip(losses, *(one for one, _ in others), strict=True)
            ]
            out[case] |= {"spread": moved, "loss spread": apart}
    if rank == 0:
        Path(folder, "out.json").write_text(json.dumps(out))
    if world > 1:
        dist.barrier()  # gloo aborts when one side goes away while the other still talks
        dist.destroy_process_group()


def _distance(one: Tensor, other: Tensor) -> float:
    """How far two tensors are apart, as a norm; where both are not numbers they agree."""
    apart = (one.double() - other.double()).nan_to_num()
    return float(f"{float(apart.norm()):.2g}")


def run_world(world: int, data: dict[str, Samples], double: bool, spread: bool) -> dict[str, Any]:
    """All cases on `world` ranks, each a process forked from this one."""
    context = multiprocessing.get_context("fork")  # torch is imported once
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(r, world, data, folder, double, spread)) for r in range(world)]
        for process in ranks:
            process.start()
        while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
            time.sleep(0.05)
        failed = [process.exitcode for process in ranks if process.exitcode]
        for process in ranks if failed else ():
            process.kill()  # it waits for the one that failed
        if failed:
            raise SystemExit(f"a rank of {world} ended with {failed[0]}, its traceback is above")
        return json.loads(Path(folder, "out.json").read_text())


def record(double: bool = False, spread: bool = False) -> dict[str, Any]:
    """All golden values of the code as it is, from training in float32 or float64."""
    data = {name: Samples(name) for name in KINDS}
    found = {world: run_world(world, data, double, spread) for world in WORLDS}
    cases = {}
    for case in CASES:
        names = sorted({name for world in WORLDS for name in found[world][case]["tensors"]})
        cases[case] = {
            "losses": {str(world): found[world][case]["losses"] for world in WORLDS},
            "all": {str(world): found[world][case]["all"] for world in WORLDS},
            "tensors": {name: [found[world][case]["tensors"].get(name) for world in WORLDS] for name in names},
        }
        if spread:
            spreads = [found[world][case]["spread"] for world in WORLDS]
            cases[case]["spread"] = {name: max(one.get(name, 0.0) for one in spreads) for name in names}
            steps = zip(*(found[world][case]["loss spread"] for world in WORLDS), strict=True)
            cases[case]["loss spread"] = [max(step) for step in steps]
    samples = {
        name: {"data": describe(one.train[0]), "labels": describe(one.train[1]), "val": describe(one.val)}
        for name, one in data.items()
    }
    exact = {"plans": plans(), "archs": drawn_archs(), "indexes": indexes()}
    return json.loads(json.dumps({"machine": machine(), "exact": exact, "samples": samples, "cases": cases}))


def record_all() -> dict[str, Any]:
    """What golden.json holds: digests of float32, numbers of float64, and behind the rows of a tensor its spread."""
    single, double = record(), record(double=True, spread=True)
    for name, case in single["cases"].items():
        other = double["cases"][name]
        case["double losses"], case["loss spread"] = other["losses"], other["loss spread"]
        for tensor, rows in case["tensors"].items():
            pairs = zip(rows, other["tensors"][tensor], strict=True)
            both = [a and f"{a.partition(' ')[0]} {b.partition(' ')[2]}" for a, b in pairs]
            case["tensors"][tensor] = [*both, other["spread"][tensor]]
    return single


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--double", action="store_true", help="train in float64")
    parser.add_argument("--all", action="store_true", help="both, with spreads")
    arguments = parser.parse_args()
    arguments.file.write_text(_text(record_all() if arguments.all else record(arguments.double)) + "\n")


def _text(node: Any) -> str:
    """JSON with a line for every innermost list or mapping."""
    if isinstance(node, dict) and any(isinstance(value, dict | list) for value in node.values()):
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {_text(value)}" for key, value in node.items()) + "\n}"
    return json.dumps(node)


if __name__ == "__main__":
    main()
