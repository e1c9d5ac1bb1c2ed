"""A small MicroNet language model on the Penn Treebank against a plain Transformer, then with cache and compressed.

`python -m tests.benchmarks language_model` (SLIMRAY_SEEDS="0 1" selects seeds, SLIMRAY_ROWS="plain micronet" selects
rows; the text is in $SLIMRAY_SHARED/data/text/ptb). One process, one thread, no Ray: words, windows, steps, masks and
bits are those of jobs/ptb_micronet.yaml and of `compress`. All networks are trained alike, for as many epochs and at
the same rates, and the weights of the last step are scored. Only the sharpness and the share of the cache are tuned, on
the first 8,192 words of the validation split; rows with a cache report the second half. The state of a training and all
results are kept in `SLIMRAY_BENCH_DIR`: what is there is not computed again, so an interrupted command continues.
"""

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import yaml
from tests.benchmarks.kept import Filled, Row, Training, print_rows
from torch import Tensor, nn

from slimray import compress, models, storage
from slimray.compress import slim_file, sparsity
from slimray.data.cards import Card, load_card
from slimray.data.conversion import Made, Raw
from slimray.data.plan import SHUFFLE, Phase
from slimray.data.ragged import joined
from slimray.data.text.conversion import convert_text, files_of, learn_vocabulary
from slimray.data.text.samples import TextRecipe, load_text, window_arrays, write_text_shard
from slimray.data.text.spec import TextSpec
from slimray.data.text.vocabulary import PAD, vocabulary_of
from slimray.edge import cost
from slimray.edge.micronet_score import counting_of, micronet_score
from slimray.models.text.micronet import CACHE_START, MicroNetLM, Shape
from slimray.runtime.inputs import Input
from slimray.tasks import TASKS
from slimray.tasks.network import load_slim
from slimray.train import optimizers
from slimray.train.methods.constrained import Constrained
from slimray.train.methods.distilled import Distilled, DistilledReplica
from slimray.train.methods.method import Method, Setup
from slimray.train.methods.plain import Plain, PlainReplica
from slimray.train.spec import OptimSpec

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SLIMRAY_SHARED", ROOT.parent / "shared"))
TEXTS = str(SHARED / "data/text/ptb")
TASK, CPU = TASKS["language"], torch.device("cpu")
AT_ONCE, CACHE_STEP = 16, 0.2
KEPT, LONGER, CALIBRATED = 0.5, {"epochs": 1, "lr": 0.001, "warmup_steps": 20}, 8
CACHES, TUNED = (500, 2000), 8192  # positions; words on which a cache is tuned
PLAIN = {"name": "transformer_lm", "embed": 80, "ffn": 256, "heads": 4, "layers": 4, "dropout": 0.0}


@dataclass(frozen=True)
class Recipe:
    """What jobs/ptb_micronet.yaml says of words, network, batches and optimizer."""

    text: TextSpec
    model: dict[str, Any]
    batch: int
    optim: OptimSpec

    @classmethod
    def of_job(cls) -> "Recipe":
        prepare, train, _ = yaml.safe_load_all((ROOT / "jobs/ptb_micronet.yaml").read_text())
        optim = OptimSpec.model_validate(train["optim"])
        return cls(TextSpec.model_validate(prepare["text"]), train["model"], train["batch"]["total"], optim)


class Bench:
    """Data, recipe and the folder of results of one seed."""

    def __init__(self, folder: Path, seed: int):
        self.job, self.folder, self.seed = Recipe.of_job(), folder, seed
        self.card: Card = load_card("ptb", [ROOT / "datasets"])
        kept = folder / "language-words.txt"
        if not kept.exists():
            kept.write_text(learn_vocabulary(self.card, TEXTS, self.job.text))
        self.vocabulary = kept.read_text()
        self.recipe = TextRecipe(
            1, self.job.text.length, vocabulary_of(self.vocabulary).size, self.vocabulary, max_tokens=50
        )
        fs, shards = storage.open_uri(str(folder))
        self.rows: list[dict[str, Any]] = []
        made = self.read("train", self.job.text.stream)
        write_text_shard(fs, storage.join(shards, "language-train.parquet"), [vars(one) for one in made])
        self.rows = [{"shard": "language-train.parquet", "row": row, **one.shape} for row, one in enumerate(made)]

    def read(self, split: str, stream: int | None) -> list[Made]:
        """Return windows or streams of a split as `prepare` makes them."""
        text = self.job.text.model_copy(update={"stream": stream})
        raw = Raw(TEXTS, self.card, None, 1, 0, text=text, vocabulary=self.vocabulary)
        path = f"{files_of(self.card, split)[0][0]}.gz"
        return [one for one in convert_text(raw, {"split": split, "path": path}, None) if isinstance(one, Made)]  # type: ignore[arg-type]

    def file(self, name: str) -> Path:
        """The file of that name of this seed."""
        return self.folder / f"language-{self.seed}-{name}"

    def model(self, name: str) -> dict[str, Any]:
        """The model that a row trains."""
        given = (
            PLAIN if name == "plain" else self.job.model | {"preset": "ptb"} if name == "teacher" else self.job.model
        )
        return {**given, "vocab_size": self.recipe.vocab_size}

    def network(self, name: str) -> nn.Module:
        """The trained network of a row, as its last step left it."""
        net = compress.build(**self.model(name))
        net.load_state_dict(safetensors.torch.load_file(self.file(f"{name}.safetensors")))
        return net.eval()

    # ------------------------------------------------------------------------------------------------ training

    def fit(self, name: str, method: Method, optim: OptimSpec, begun: Mapping[str, Tensor] | None = None) -> None:
        """Train the model of a row, or go on; `begun` are its weights at the start. What it took is kept."""
        torch.manual_seed(self.seed)
        net = models.build(**self.model(name))
        if begun is not None:
            net.load_state_dict(begun)
        setup = Setup(optim, Input(), (self.job.text.length + 1,), CPU, batch_total=self.job.batch, task=TASK)
        replica: PlainReplica = method.replica(net, lambda: net, setup)  # type: ignore[assignment]
        training = Training(self.file(f"{name}-state.safetensors"), replica, name)
        for epoch in range(optim.epochs):
            phase = Phase("train", "train", epoch, len(self.rows), self.job.batch, True, {}, version=SHUFFLE)
            first = epoch * phase.num_steps
            for step in range(max(0, training.steps - first), phase.num_steps):
                piece = self.piece(phase, step)
                weight = float((piece.labels != PAD).sum())
                rate = optimizers.learning_rate(optim, self.job.batch, 1, 0, training.steps, phase.num_steps)
                report = replica.step([piece], weight / phase.share(step), rate, (self.seed, training.steps))
                assert report.finite
                training.add(report.loss_sum, weight, phase.num_steps)
        training.keep()
        safetensors.torch.save_file(replica.averaged().state_dict(), self.file(f"{name}.safetensors"))
        self.file(f"{name}.json").write_text(json.dumps(training.spent))

    def piece(self, phase: Phase, step: int) -> Filled:
        """The windows of a step, filled up to the longest: int32 `[n, 1, L + 1]` and int64 `[n, L]`."""
        ((lo, hi),) = phase.plan.microbatches(step, 0, 1, self.job.batch)
        found = [
            load_text(self.rows[row], str(self.folder), self.recipe, (self.seed, phase.epoch, int(row)), 0.0)
            for row in phase.plan.samples(lo, hi, self.seed, lambda: np.arange(len(self.rows)))
        ]
        return Filled(*(joined([one[None] for one in column], PAD) for column in zip(*found, strict=True)))

    # ------------------------------------------------------------------------------------------------- scoring

    @cached_property
    def val(self) -> np.ndarray:
        """All tokens of the validation split, the end of a line before the first."""
        return self.streams(10**6)[0]

    def streams(self, length: int) -> list[np.ndarray]:
        """The validation split in streams of so many tokens, each with the one before its first."""
        found = ((json.loads(one.data)["tokens"], one.shape["frames"]) for one in self.read("val", length))
        return [np.array(tokens[: frames + 1], np.int32) for tokens, frames in found]

    @torch.no_grad()
    def perplexity(self, net: nn.Module, streams: list[np.ndarray], last: int | None = None) -> float:
        """Perplexity per word of streams, each scored alone, of the `last` tokens of each, None of all."""
        score = TASK.score(0, self.recipe.to_dict())
        streams = sorted(streams, key=len)
        for first in range(0, len(streams), AT_ONCE):
            pairs = [window_arrays(one) for one in streams[first : first + AT_ONCE]]
            data, wanted = (joined([one[None] for one in column], PAD) for column in zip(*pairs, strict=True))
            if last is not None:
                wanted[:, :-last] = PAD
            score.add(net(torch.from_numpy(data[:, 0])), torch.from_numpy(wanted))
        return float(score.result()["perplexity"])

    def sliding(self, net: nn.Module) -> float:
        """Perplexity where windows as long as in training overlap by half: every word but the first has half a window
        before it at least."""
        length, half = self.job.text.length, self.job.text.length // 2
        whole, rest = divmod(len(self.val) - 1 - length, half)
        others = [self.val[start : start + length + 1] for start in range(half, (whole + 1) * half, half)]
        parts = [([self.val[: length + 1]], None), (others, half), ([self.val[-length - 1 :]], rest)]
        nll, count = 0.0, 0
        for windows, last in parts:
            tokens = len(windows) * (last or length)
            if windows and last != 0:
                nll, count = nll + tokens * np.log(self.perplexity(net, windows, last)), count + tokens
        assert count == len(self.val) - 1
        return float(np.exp(nll / count))

    def costs(self, net: nn.Module, model: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters, multiply-accumulates a word, and the score of the MicroNet challenge with what it is made of.

        The plain Transformer is counted as a MicroNet of its sizes, whose relative positions and biases of words it has
        not: 2 % too much.
        """
        length = self.job.text.length
        if isinstance(net, MicroNetLM):
            sizes, cache = net.shape, net.cache
        else:
            heads, width = model["heads"], model["embed"]
            key = width // heads
            sizes, cache = Shape((width,), (), model["layers"], heads, key, key, model["ffn"], length), 0
        edges = (*sizes.cutoffs, self.recipe.vocab_size)
        shares = [float(np.mean((self.val[1:] >= low) & (self.val[1:] < high))) for low, high in pairwise(edges)]
        counting = counting_of(net, shares, all_heads=True)
        if not isinstance(net, MicroNetLM):
            counting = replace(counting, density={}, masked=False)  # its one row of zeros is PAD
        found = micronet_score(sizes, self.recipe.vocab_size, cache, counting)
        carried = sizes.layers * (sizes.context - 1) * sizes.heads * (sizes.key + sizes.value)
        return {
            "parameters": cost.count_params(net),
            "nonzero": found.total("nonzero"),
            "macs": cost.count_macs(net, (1, length + 1)) / length,
            "storage": found.storage,
            "operations": found.operations,
            "score": found.score,
            "carried": carried + cache * (sizes.widths[0] + 1),
        }

    def with_cache(self, net: nn.Module, positions: int) -> tuple[MicroNetLM, dict[str, float]]:
        """The same network with a cache, and its sharpness and share, found on the first words of the split.

        From those that a training begins with, one after the other is multiplied as long as that helps; then by less.
        """
        net = copy.deepcopy(net)
        assert isinstance(net, MicroNetLM)
        net.cache = positions
        net.cache_sharpness, net.cache_share = (nn.Parameter(torch.zeros(())) for _ in range(2))

        def reached(values: Mapping[str, float]) -> float:
            with torch.no_grad():
                net.cache_sharpness.copy_(torch.tensor(values["sharpness"]).expm1().log())
                net.cache_share.copy_(torch.tensor(values["share"]).logit())
            return self.perplexity(net, [self.val[: TUNED + 1]])

        values: dict[str, float] = dict(zip(("sharpness", "share"), CACHE_START, strict=True))
        steps = [1.0, 1.0]
        best = reached(values)
        while max(map(abs, steps)) > CACHE_STEP:
            for number, name in enumerate(values):
                tried = values | {name: min(0.9, values[name] * float(np.exp(steps[number])))}
                if (found := reached(tried)) < best:
                    best, values = found, tried
                else:
                    steps[number] *= -0.5
        reached(values)
        return net.eval(), values

    @cached_property
    def halves(self) -> list[np.ndarray]:
        """The validation split as two streams."""
        middle = (len(self.val) - 1) // 2
        return [self.val[: middle + 1], self.val[middle:]]

    # ---------------------------------------------------------------------------------------------------- rows

    def judged(self, net: nn.Module, model: Mapping[str, Any]) -> dict[str, Any]:
        """Perplexities of the validation split, and costs: in windows as in training, alone and overlapping by half; of
        a network with a memory as one stream, and of the second half of it."""
        windows = {"windows": self.perplexity(net, self.streams(self.job.text.length)), "sliding": self.sliding(net)}
        if isinstance(net, MicroNetLM):
            windows |= {"stream": self.perplexity(net, [self.val]), "half": self.perplexity(net, self.halves[1:])}
        return windows | self.costs(net, model)

    def trained(self, name: str, method: Method | None = None) -> dict[str, Any]:
        """A network trained by the job's recipe."""
        if not self.file(f"{name}.json").exists():
            self.fit(name, method or Plain(), self.job.optim)
        took = json.loads(self.file(f"{name}.json").read_text())
        return {**took, **self.judged(self.network(name), self.model(name))}

    def cached(self, net: nn.Module, positions: int) -> dict[str, Any]:
        """A network with a cache of so many positions: the second half of the validation split, and costs."""
        made, values = self.with_cache(net, positions)
        found = {"half": self.perplexity(made, self.halves[1:]), **self.costs(made, self.job.model)}
        return {"positions": positions, **values, **found}

    def distilled(self) -> dict[str, Any]:
        """The network learns from the labels and, as much, from the row `teacher`."""
        return self.trained("distilled", Taught(self.network("teacher"), Distilled("", weight=0.5, labels=0.5)))

    def pruned(self) -> dict[str, Any]:
        """The network of `micronet` with half of the weights of its linear layers, before and after an epoch more."""
        net = self.network("micronet")
        record = sparsity.sparsify(net, dict.fromkeys(sparsity.layers_of(net), KEPT))
        before = self.perplexity(net, [self.val])
        if not self.file("pruned.json").exists():
            self.fit("pruned", Constrained(Plain()), self.job.optim.model_copy(update=LONGER), net.state_dict())
        net = self.network("pruned")
        assert sparsity.density(net) == {name: tuple(counts) for name, counts in record["weights"].items()}
        took = json.loads(self.file("pruned.json").read_text())
        return {"stream_before": before, **took, **self.judged(net, self.job.model)}

    def longer(self) -> dict[str, Any]:
        """The network of `micronet` after the same further epoch with all its weights."""
        if not self.file("longer.json").exists():
            optim = self.job.optim.model_copy(update=LONGER)
            self.fit("longer", Plain(), optim, self.network("micronet").state_dict())
        took = json.loads(self.file("longer.json").read_text())
        return {**took, **self.judged(self.network("longer"), self.job.model)}

    def few_bits(self, name: str, bits: int) -> dict[str, Any]:
        """A network in few bits after training, tables of words too, read again from its `model.slim`."""
        net, model = self.network(name), self.model(name)
        phase = Phase("train", "train", 0, len(self.rows), self.job.batch, True, {}, version=SHUFFLE)
        batches = [torch.from_numpy(self.piece(phase, step).data[:, 0]) for step in range(CALIBRATED)]
        made = compress.quantize(net, batches[0][:2], batches, (bits, 8), "int8", embeddings=bits)
        taken = {"recipe": self.recipe.to_dict(), "pixels": asdict(Input()), "classes": [], "task": "language"}
        path = self.file(f"{name}-{bits}.slim")
        path.write_bytes(slim_file.encode(dict(made.net.state_dict()), {**model, "compression": [made.record]}, taken))
        read = load_slim(path.read_bytes(), str(path)).net
        found = {"bytes": path.stat().st_size, "bytes_before": 4 * cost.count_params(net)}
        return found | self.judged(read, model) | {"cache": self.cached(read, CACHES[0])}


@dataclass(frozen=True)
class Taught:
    """Distillation by a network at hand, which in a job is that of a run."""

    teacher: nn.Module
    method: Distilled

    def replica(self, net: nn.Module, build: Callable[[], nn.Module], setup: Setup) -> DistilledReplica:
        """The replica of `Distilled`."""
        return DistilledReplica(net, self.teacher, self.method, setup)

    def held(self, epoch: int) -> tuple[int, int]:
        """Hold nothing out."""
        return 0, 0


ROWS: dict[str, Callable[[Bench], Row]] = {
    "plain": lambda bench: bench.trained("plain"),
    "micronet": lambda bench: bench.trained("micronet"),
    **{f"cache{n}": lambda bench, n=n: bench.cached(bench.network("micronet"), n) for n in CACHES},
    "teacher": lambda bench: bench.trained("teacher"),
    "distilled": Bench.distilled,
    "longer": Bench.longer,
    "pruned": Bench.pruned,
    "pruned8": lambda bench: bench.few_bits("pruned", 8),
    "micronet8": lambda bench: bench.few_bits("micronet", 8),
}


def main() -> None:
    """Print a line per row."""
    print_rows(Bench, ROWS)


if __name__ == "__main__":
    main()
