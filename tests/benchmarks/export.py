"""Agreement and speed of exported networks in every format; and the cost of a frame of an online TSM.

The networks have seeded weights, and BatchNorm statistics from the inputs themselves: this is about agreement and time,
not about accuracy. Pictures and clips are real where `../shared` has them; clouds are drawn on spheres and boxes.
`python -m tests.benchmarks.export frames online pvcnn_cls tsm_resnet50:onnx ...` selects rows, or formats of a row.
SLIMRAY_SAMPLES sets another number than 200 samples (the largest networks use a quarter). SLIMRAY_BENCH_DIR is a folder
in which converted files are kept for the next call of the same code.
"""

import atexit
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from slimray import models
from slimray.edge import runtimes
from slimray.export import exported, graph, verify
from slimray.export.formats import FORMATS, Arrays, Runner
from slimray.models.tsm import OnlineTSM
from slimray.runtime.pairs import Pairs, alternate, enclosing

SHARED = Path(os.environ.get("SLIMRAY_SHARED", Path(__file__).resolve().parents[3] / "shared"))
SAMPLES, PAIRS, SIDE = int(os.environ.get("SLIMRAY_SAMPLES", "200")), 9, 128
ONLINE_PAIRS, STREAM = 11, 32
REASON = 400  # characters of an error
NAMES = ("onnx", "onnx_int8", "openvino", "executorch", "executorch_int8", "torch")
EAGER = "eager"  # torch without export
STEPPED = ("onnx", "openvino", "executorch", "torch", EAGER)
CLIP = {"num_classes": 27, "num_segments": 8}


def pixels(count: int, side: int) -> Tensor:
    """Pictures `[count, 3, side, side]`, normalised: photographs, as often as needed and mirrored."""
    files = sorted((SHARED / "data/images/person").rglob("*.jp*g"))[:count]
    pictures = [np.asarray(Image.open(file).convert("RGB").resize((side, side))) for file in files]
    x = torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 255
    x = torch.cat([x, x.flip(-1)] * (count // len(x) + 1))[:count]
    return (x - 0.45) / 0.225


def clips(count: int, side: int = 96) -> Tensor:
    return pixels(count * 8, side).view(count, 8, 3, side, side)


def clouds(count: int, channels: int, points: int, one_hot: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    xyz = torch.randn(count, 3, points, generator=generator)
    xyz = xyz / torch.where(
        torch.arange(count)[:, None, None] % 2 > 0, xyz.norm(dim=1, keepdim=True), xyz.abs().amax(1, True)
    )
    rest = torch.randn(count, channels - 3, points, generator=generator)
    if one_hot:
        rest[:, -one_hot:] = 0
        rest[:, -one_hot] = 1
    return torch.cat([xyz, rest], 1)


def subnet() -> nn.Module:
    net = models.build("ofa_mobilenetv3", num_classes=100)
    return net.extract(net.space.smallest())


ROWS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], dict[int, str]]] = {
    "tsm_mobilenetv2": (lambda: models.build("tsm_mobilenetv2", **CLIP), clips, {}),
    "tsm_resnet50": (lambda: models.build("tsm_resnet50", **CLIP), lambda n: clips(n // 4), {}),
    "resnet50": (lambda: models.build("resnet50", num_classes=100), lambda n: pixels(n, SIDE), {}),
    "ofa_mobilenetv3 (smallest)": (subnet, lambda n: pixels(n, SIDE), {}),
    "pvcnn_cls": (lambda: models.build("pvcnn_cls", num_classes=10), lambda n: clouds(n, 3, 1024), {2: "points"}),
    "pvcnn_shapenet 0.5": (
        lambda: models.build("pvcnn_shapenet", num_classes=50, width=0.5),
        lambda n: clouds(n, 22, 1024, 16),
        {2: "points"},
    ),
    "pointnetpp_ssg_shapenet": (
        lambda: models.build("pointnetpp_ssg_shapenet", num_classes=50),
        lambda n: clouds(n, 22, 1024, 16),
        {2: "points"},
    ),
    "dgcnn_shapenet": (
        lambda: models.build("dgcnn_shapenet", num_classes=50),
        lambda n: clouds(n, 22, 1024, 16),
        {2: "points"},
    ),
    "frustum_pvcnne": (
        lambda: models.build("frustum_pvcnne", num_classes=3),
        lambda n: clouds(n, 7, 1024, 3),
        {2: "points"},
    ),
    "carn x2": (
        lambda: models.build("carn", scale=2, width=32),
        lambda n: pixels(n // 4, 48),
        {2: "height", 3: "width"},
    ),
}


def settled(net: nn.Module, x: Tensor) -> nn.Module:
    """`net` in eval mode, its statistics those of `x`, and a head whose answers differ."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    head = dict(net.named_modules())[net.head_name]
    if isinstance(head, nn.Linear):
        nn.init.normal_(head.weight, 0, head.in_features**-0.5)
    with torch.no_grad():
        net.train()(x)
        if isinstance(head, nn.Conv2d):  # of pictures: what drawn layers give is lost beside the mean that is added
            seen: list[Tensor] = []
            hook = head.register_forward_hook(lambda *call: seen.append(call[-1]))
            net(x)
            hook.remove()
            head.weight /= seen[0].std()
    return graph.ready(net)


@torch.no_grad()
def outputs(net: nn.Module, x: Tensor):
    found = [net(part) for part in x.split(4)]
    if isinstance(found[0], dict):
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}
    return torch.cat(found)


@functools.cache
def kept() -> Path:
    """Where converted files lie."""
    if folder := os.environ.get("SLIMRAY_BENCH_DIR"):
        return Path(folder)
    made = tempfile.mkdtemp(prefix="slimray-export-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def converted(one: graph.Graph, form: str, name: str, seen: Sequence[Arrays] = ()) -> Path:
    """The folder with a graph in a format: made, or kept under that name from a call before."""
    row, folder = FORMATS[form], kept() / f"export-{form}-{name.replace(' ', '-')}-{SAMPLES}"  # statistics are of them
    if not folder.exists():
        part = kept() / f".{folder.name}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        row.convert(one, part, seen)
        part.rename(folder)
    return folder


def against_eager(one: graph.Graph, runner: Runner) -> Pairs:
    """Milliseconds of the processor for one sample, or frame, against the module in torch: in turn, PAIRS times.

    Of three calls the quickest counts. Waiting for a core is left out, as in slimray.edge.profiler.
    """
    arrays = [np.ascontiguousarray(value[:1].numpy()) for value in one.inputs.values()]

    def once(run: Runner) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            run(arrays)
            best = min(best, time.process_time() - start)
        return 1e3 * best

    with runtimes.settings(1):
        eager = in_torch(one.module)
        once(runner), once(eager)
        return alternate(lambda: once(runner), lambda: once(eager), PAIRS)


def report(name: str, net: nn.Module, one: graph.Graph, x: Tensor, formats: tuple[str, ...] = NAMES) -> None:
    """Print a line per format."""
    expected = outputs(net, x)
    for form in formats:
        row = FORMATS[form]
        chosen = one
        if not row.varies or one.states:
            chosen = replace(one, inputs={key: value[:1] for key, value in one.inputs.items()}, varying={})
        try:
            seen = verify.calibration(chosen, x[: 4 if one.states else 16]) if row.calibrated else []
            folder = converted(chosen, form, name, seen)
            runner = row.load(folder / row.file, 1, True)
            ports = exported.ports_of(chosen, row.varies and not one.states)
            found = outputs(exported.ExportedNet(runner, ports), x)
            gap = verify.differences(found, expected)
            told = f"rel {gap['relative']:.1e}, worst sample {gap['worst_sample']:.1e}, max {gap['max_abs']:.1e}"
            if isinstance(found, Tensor) and name != "carn x2":
                told += f", same class {verify.agreement(found, expected):.2f} % of {len(x)}"
            if row.calibrated and row.optimises and isinstance(found, Tensor):
                plain = exported.ExportedNet(row.load(folder / row.file, 1, False), ports)
                told += f", unoptimised {verify.agreement(outputs(plain, x), found):.2f} % as optimised"
            size = sum((folder / file).stat().st_size for file in (row.file, *row.files)) / 1e6
            took = against_eager(chosen, runner)
            low, high = took.interval
            told += f", {size:.2f} MB, {median(took.a):.2f} ms, {took.ratio:.3f} [{low:.3f}, {high:.3f}] of eager"
        except Exception as error:  # noqa: BLE001  the reason is the result
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            told = f"does not work: {type(error).__name__}: {' '.join(lines)[:REASON]}"
        print(f"{name} | {form} | {told}", flush=True)


def in_torch(module: nn.Module) -> Runner:
    """A module as it is, in eager mode."""

    def run(arrays: Arrays) -> list[np.ndarray]:
        with torch.inference_mode():
            found = module(*map(torch.from_numpy, arrays))
        found = tuple(found.values()) if isinstance(found, dict) else found
        return [one.numpy() for one in (found if isinstance(found, tuple) else (found,))]

    return run


def frames(forms: tuple[str, ...], side: int = 224) -> None:
    """A frame of an online TSM against eight frames again, and against MobileNetV2 without shift."""
    torch.manual_seed(0)
    x = pixels(16, side).view(2, 8, 3, side, side)
    net = settled(models.build("tsm_mobilenetv2", **CLIP, causal=True), x)
    stream = pixels(STREAM, side)[None]
    stepped = OnlineTSM(net).eval()
    one = graph.step(net, x, "online")
    again = graph.whole(net, x[:2], {})
    plain = models.build("mobilenetv2", num_classes=27)
    plain = graph.whole(settled(plain, x[0]), x[0][:2], {})
    print(f"states: {len(one.states)}, {sum(4 * np.prod(s.shape) for s in one.states):,.0f} bytes", flush=True)
    with torch.no_grad():
        states, expected = stepped.initial_buffers(1, side, side), []
        for frame in stream[0]:
            logits, states = stepped(frame[None], states)
            expected.append(logits)
    for form in forms:
        runners = {}
        for key, this in (("step", one), ("clip", again), ("plain", plain)):
            this = replace(this, inputs={name: value[:1] for name, value in this.inputs.items()}, varying={})
            if form == EAGER:
                run = in_torch(this.module)
            else:
                run = FORMATS[form].load(converted(this, form, f"{key}-{side}") / FORMATS[form].file, 1, True)
            runners[key] = (run, [np.ascontiguousarray(value.numpy()) for value in this.inputs.values()])
        step, given = runners["step"]
        found, arrays = [], [np.zeros_like(state) for state in given[1:]]
        for frame in stream[0].numpy():
            logits, *arrays = step([frame[None], *arrays])
            found.append(torch.from_numpy(logits))
        gap = verify.differences(torch.cat(found), torch.cat(expected))
        calls = {key: (lambda run=run, given=given: run(given)) for key, (run, given) in runners.items()}
        with runtimes.settings(1):
            clip = verify.timed_pairs(calls["clip"], calls["step"], ONLINE_PAIRS, repeats=2)
            base = verify.timed_pairs(calls["step"], calls["plain"], ONLINE_PAIRS, repeats=2)
        skip, ms = enclosing(ONLINE_PAIRS), sorted(base.a)
        print(
            f"online {form}: of {STREAM} frames the worst {gap['worst_sample']:.1e}; "
            f"{median(ms):.2f} [{ms[skip]:.2f}, {ms[-1 - skip]:.2f}] ms a frame; "
            f"eight frames again {clip.ratio:.2f} [{clip.interval[0]:.2f}, {clip.interval[1]:.2f}] times; "
            f"against MobileNetV2 {base.ratio:.3f} [{base.interval[0]:.3f}, {base.interval[1]:.3f}]",
            flush=True,
        )


def main(names: tuple[str, ...] = ()) -> None:
    print(
        f"{runtimes.cpu_name()} ({' '.join(runtimes.cpu_flags())}), one thread, torch {torch.__version__}", flush=True
    )
    torch.set_num_threads(1)
    asked: dict[str, tuple[str, ...]] = {}  # formats by the first word of a row
    for row, _, form in (name.partition(":") for name in names):
        every = STEPPED if row == "frames" else NAMES
        asked[row] = (*asked.get(row, ()), *((form,) if form else every))
    if not names or "frames" in asked:
        frames(asked.get("frames", STEPPED))
    if not names or "online" in asked:
        x = clips(SAMPLES // 8)
        torch.manual_seed(0)
        net = settled(models.build("tsm_mobilenetv2", **CLIP, causal=True), x[:8])
        report("tsm_mobilenetv2 online", net, graph.step(net, x, "online"), x, asked.get("online", NAMES))
    for name, (make, inputs, varying) in ROWS.items():
        if not names or name.split()[0] in asked:
            x = inputs(SAMPLES)
            torch.manual_seed(0)  # the weights of files that are kept
            net = settled(make(), x[:8])
            report(name, net, graph.whole(net, x[:2], varying), x, asked.get(name.split()[0], NAMES))


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
