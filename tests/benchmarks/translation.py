"""English captions into German with the recipe of jobs/multi30k.yaml: trained from scratch, in few bits, and exported.

`python -m tests.benchmarks translation` (SLIMRAY_SEEDS="0 1" selects seeds, SLIMRAY_ROWS="trained kmeans4" selects
rows; Multi30k is in $SLIMRAY_SHARED/data/text/multi30k_task1). One process, one thread, no Ray: tokens, bags, steps,
search, quantization, file and graphs are those of the job and of `evaluate`, `compress` and `export`. Scores are BLEU
and chrF of test_2016_flickr against the references as they were written, by sacrebleu, with its signature. The state of
the training and all results are kept in `SLIMRAY_BENCH_DIR`: what is there is not computed again, so an interrupted
command continues. The checkpoint with the lowest validation perplexity is scored; nothing is chosen on the test set.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import yaml
from tests.benchmarks.kept import Filled, Training, print_rows
from torch import Tensor, nn
from torch.nn import functional

from slimray import compress, models
from slimray.compress import quantization, slim_file
from slimray.data.cards import Card, load_card
from slimray.data.conversion import Made, Raw
from slimray.data.plan import Phase, microbatches
from slimray.data.ragged import joined
from slimray.data.text.conversion import convert_text, files_of, learn_vocabulary
from slimray.data.text.samples import TextRecipe, pair_arrays
from slimray.data.text.spec import TextSpec
from slimray.data.text.vocabulary import EOS, PAD, vocabulary_of
from slimray.data.token_plan import Bags
from slimray.edge.runtimes import settings
from slimray.export import graph, translation, verify
from slimray.export.formats import FORMATS
from slimray.models.text.decoding import MAX_LENGTH, beam_search, greedy
from slimray.runtime.inputs import Input
from slimray.tasks import TASKS
from slimray.tasks.evaluation import Samples
from slimray.tasks.network import Network, load_slim
from slimray.tasks.text_scores import CorpusMetric, Counts, paired_bootstrap
from slimray.tasks.translate import SCORES, translations
from slimray.train import optimizers
from slimray.train.methods.method import Method, Setup
from slimray.train.methods.plain import Plain
from slimray.train.spec import OptimSpec

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SLIMRAY_SHARED", ROOT.parent / "shared"))
TEXTS = str(SHARED / "data/text/multi30k_task1")
TASK, CPU = TASKS["translate"], torch.device("cpu")
AT_ONCE, CALIBRATED, COMPARED, PAIRS = 64, 256, 200, 15


@dataclass(frozen=True)
class Recipe:
    """What jobs/multi30k.yaml says of tokens, search, network, batches and optimizer."""

    text: TextSpec
    search: dict[str, Any]
    model: dict[str, Any]
    batch: dict[str, int]
    optim: OptimSpec

    @classmethod
    def of_job(cls) -> "Recipe":
        prepare, train, _ = yaml.safe_load_all((ROOT / "jobs/multi30k.yaml").read_text())
        optim = OptimSpec.model_validate(train["optim"])
        text = TextSpec.model_validate(prepare["text"])
        return cls(text, train["data"]["task"], train["model"], train["batch"], optim)


@dataclass(frozen=True)
class Split:
    """Samples of a split as arrays, and the texts they were made of."""

    pairs: list[tuple[np.ndarray, np.ndarray]]
    texts: list[tuple[str, str]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer side of each pair."""
        return np.array([len(wanted) for _, wanted in self.pairs])

    @cached_property
    def by_length(self) -> np.ndarray:
        """Rows from short to long."""
        return np.argsort(self.lengths, kind="stable")

    def piece(self, rows: Sequence[int] | np.ndarray) -> Filled:
        """Samples filled up to the longest of them: int32 `[n, 1, 2, L]` and int64 `[n, L]`."""
        columns = zip(*(self.pairs[row] for row in rows), strict=True)
        return Filled(*(joined([value[None] for value in column], PAD) for column in columns))


def read(card: Card, split: str, text: TextSpec, vocabulary: str) -> Split:
    """Return a split as `prepare` makes it."""
    raw, pairs, texts = Raw(TEXTS, card, None, 1, 0, text=text, vocabulary=vocabulary), [], []
    for made in convert_text(raw, {"split": split, "path": files_of(card, split)[0][0]}, None):  # type: ignore[arg-type]
        if isinstance(made, Made):
            row = json.loads(made.data)
            pairs.append(pair_arrays(*(np.array(row[side], np.int32) for side in ("tokens", "target"))))
            texts.append((row["text"], row["translation"]))
    return Split(pairs, texts)


class Bench:
    """Data, recipe and the folder of results of one seed; its files are called `prefix`-SEED-NAME."""

    def __init__(self, folder: Path, seed: int, prefix: str = "translation"):
        self.job, self.folder, self.seed, self.prefix = Recipe.of_job(), folder, seed, prefix
        card, kept = load_card("multi30k", [ROOT / "datasets"]), folder / "translation-tokenizer.txt"
        if not kept.exists():
            kept.write_text(learn_vocabulary(card, TEXTS, self.job.text))
        vocabulary = kept.read_text()
        self.train, self.val, self.test = (
            read(card, split, self.job.text, vocabulary) for split in ("train", "val", "test")
        )
        longest = int(max(split.lengths.max() for split in (self.train, self.val, self.test)))
        size = vocabulary_of(vocabulary).size
        self.recipe = TextRecipe(
            length=longest, vocab_size=size, tokenizer=vocabulary, limit=longest, mode="val", **self.job.search
        )
        self.model = {**self.job.model, "vocab_size": size}

    def file(self, name: str) -> Path:
        """The file of that name of this seed."""
        return self.folder / f"{self.prefix}-{self.seed}-{name}"

    def network(self, net: nn.Module, model: dict[str, Any] | None = None) -> Network:
        """A network as `evaluate` has it."""
        return Network(net.eval(), Input(), self.recipe.to_dict(), (), model or self.model, "translate")

    @cached_property
    def trained(self) -> Network:
        """The network of the best checkpoint."""
        net = compress.build(**self.model)
        net.load_state_dict(safetensors.torch.load_file(self.file("best.safetensors")))
        return self.network(net)

    # ------------------------------------------------------------------------------------------------ training

    def fit(self) -> dict[str, Any]:
        """Train the network of the job, or go on."""
        torch.manual_seed(self.seed)
        return self.learned(Plain(), models.build(**self.model), self.job.optim, self.job.batch)

    def learned(
        self,
        method: Method,
        net: nn.Module,
        optim: OptimSpec,
        batch: Mapping[str, int],
        judged: Callable[[Any], nn.Module] = lambda net: net,
    ) -> dict[str, Any]:
        """Train `net`, or go on; what the best checkpoint has reached on the validation split, and what that took.

        `judged`: what of the network is validated after each epoch.
        """
        setup = Setup(optim, Input(), (2, 32), CPU, batch_total=batch["tokens"], task=TASK)
        replica = method.replica(net, lambda: net, setup)
        bags = Bags.of(self.train.lengths, batch["per_worker_tokens"], self.seed)
        size = batch["tokens"] // batch["per_worker_tokens"]
        training = Training(self.file("state.safetensors"), replica)
        for epoch in range(optim.epochs):
            phase = Phase("train", "train", epoch, len(self.train.pairs), size, True, {}, bags=bags)
            first = epoch * phase.num_steps
            for step in range(max(0, training.steps - first), phase.num_steps):
                pieces = [
                    self.train.piece(phase.plan.samples(lo, hi, self.seed, lambda: self.train.by_length))
                    for lo, hi in microbatches(phase, step, 0, 1, 1)
                ]
                weight = float(sum((piece.labels != PAD).sum() for piece in pieces))
                rate = optimizers.learning_rate(optim, batch["tokens"], 1, 0, training.steps, phase.num_steps)
                report = replica.step(pieces, weight / phase.share(step), rate, (self.seed, training.steps))
                assert report.finite
                training.add(report.loss_sum, weight, phase.num_steps)
            done = training.steps
            reached = self.validated()
            if done == first + phase.num_steps and done not in reached:
                shown = replica.averaged()
                reached[done] = self.perplexity(self.network(judged(shown)), self.val)
                if reached[done] == min(reached.values()):
                    safetensors.torch.save_file(shown.state_dict(), self.file("best.safetensors"))
                with self.file("epochs.jsonl").open("a") as out:
                    out.write(json.dumps([done, reached[done]]) + "\n")
                print(f"epoch {epoch + 1}: validation perplexity {reached[done]:.3f}", flush=True)
                training.keep()
        size = sum(one.numel() for one in judged(net).parameters())
        return {"perplexity": min(self.validated().values()), **training.spent, "parameters": size}

    def validated(self) -> dict[int, float]:
        """Validation perplexity after each epoch, by the steps that were done."""
        file = self.file("epochs.jsonl")
        return dict(json.loads(line) for line in file.read_text().splitlines()) if file.exists() else {}

    # ------------------------------------------------------------------------------------------------- scoring

    @torch.no_grad()
    def perplexity(self, network: Network, split: Split) -> float:
        """Perplexity per token."""
        score = TASK.score(0, network.recipe)
        for start in range(0, len(split.pairs), AT_ONCE):
            piece = split.piece(split.by_length[start : start + AT_ONCE])
            score.add(network.net(torch.from_numpy(piece.data[:, 0])), torch.from_numpy(piece.labels))
        return float(score.result()["perplexity"])

    def score(self, network: Network, name: str, beside: Path | None = None) -> dict[str, Any]:
        """BLEU and chrF of the test split with signatures; the translations are kept, and BLEU is compared with that of
        the translations in the file `beside` (None: the trained network's)."""
        start, said = time.perf_counter(), [""] * len(self.test.pairs)
        for first in range(0, len(said), AT_ONCE):
            rows = self.test.by_length[first : first + AT_ONCE]
            for row, text in zip(rows, translations(network, self.test.piece(rows).data[:, 0, 0]), strict=True):
                said[row] = text
        seconds = time.perf_counter() - start
        self.file(f"{name}.txt").write_text("\n".join(said))
        out: dict[str, Any] = {"seconds": seconds}
        for kind in SCORES:
            found = CorpusMetric(kind).score(self.counts(kind, said).sum(0))
            out |= {kind: found.value, f"{kind}_signature": found.signature}
        beside = beside or self.file("trained.txt")
        if name != "trained" and beside.exists():
            base = beside.read_text().split("\n")
            gain = paired_bootstrap(CorpusMetric("bleu"), self.counts("bleu", said), self.counts("bleu", base))
            out |= {
                "over_trained": asdict(gain),
                "alike": 100 * float(np.mean([a == b for a, b in zip(said, base, strict=True)])),
            }
        return out

    def counts(self, kind: Any, said: Sequence[str]) -> Counts:
        """What BLEU or chrF counts in each sentence."""
        return CorpusMetric(kind).counts(said, [translation for _, translation in self.test.texts])

    def written(self, net: nn.Module, model: dict[str, Any], name: str) -> tuple[Network, int]:
        """The network read again from a `model.slim`, and the size of that file."""
        taken = {"recipe": self.recipe.to_dict(), "pixels": asdict(Input()), "classes": [], "task": "translate"}
        path = self.file(f"{name}.slim")
        path.write_bytes(slim_file.encode(dict(net.state_dict()), model, taken))
        return load_slim(path.read_bytes(), str(path)), path.stat().st_size

    def quantized(self, name: str, scheme: Any, bits: int) -> dict[str, Any]:
        """Few bits after training: scores of what the file holds, its bytes, and by how much the layers shrank."""
        net, rows = self.trained.net, np.random.default_rng(self.seed).permutation(len(self.train.pairs))[:CALIBRATED]
        batches = [torch.from_numpy(self.train.piece(part).data[:, 0]) for part in np.split(rows, 8)]
        layers = quantization.layers_of(net, batches[0][:2])
        made = compress.quantize(net, batches[0][:2], batches, bits, scheme)
        before, saved = 4 * sum(one.weights for one in layers), 1e6 * (made.size_mb_before - made.size_mb)
        network, size = self.written(made.net, {**self.model, "compression": [made.record]}, name)
        inside, ours = slim_file.read_header(self.file(f"{name}.slim").read_bytes(), name), {one.name for one in layers}
        coded = sum(
            sum(one["bytes"])
            for one in inside.tensors
            if (parts := one["name"].rpartition("."))[0] in ours and parts[2] != "bias"
        )
        shrunk = {"layers": len(layers), "weights": before // 4, "times": before / (before - saved)}
        shrunk |= {"times_in_file": before / coded, "bytes": size}
        return {**shrunk, "perplexity": self.perplexity(network, self.test), **self.score(network, name)}

    def scored_as_trained(self) -> dict[str, Any]:
        """The trained network, from its file."""
        network, size = self.written(self.trained.net, self.model, "trained")
        shuffled = [(np.stack([a[:, 0], b[:, 1]], 1), wanted) for (a, _), (b, wanted) in self.strangers()]
        other = self.perplexity(network, Split(shuffled, []))
        found = {"perplexity": self.perplexity(network, self.test), "perplexity_of_other_sources": other}
        return {**found, "bytes": size, **self.score(network, "trained")}

    def strangers(self) -> list[tuple[Any, Any]]:
        """Test pairs, each beside another of the same length, whose source it gets."""
        order = self.test.by_length
        alike = [(a, b) for a, b in itertools.pairwise(order) if self.test.lengths[a] == self.test.lengths[b]]
        return [(self.test.pairs[a], self.test.pairs[b]) for a, b in alike]

    # ------------------------------------------------------------------------------------------------ decoding

    @torch.no_grad()
    def decoded(self) -> dict[str, Any]:
        """Whether caches, and sentences beside, change what is said: of the first sentences of the test split."""
        net, rows = self.trained.net, range(COMPARED)
        sources = torch.from_numpy(self.test.piece(rows).data[:, 0, 0]).long()
        alone = [torch.from_numpy(self.test.pairs[row][0][:, 0]).long() for row in rows]
        alone = [one[:, : int((one != PAD).sum())] for one in alone]
        cached = greedy(net, sources, MAX_LENGTH)
        search = (self.recipe.beam, self.recipe.length_penalty, self.recipe.max_length)
        beams = [found[0].tokens for found in beam_search(net, sources, *search)]
        worst = 0.0
        for row, tokens in zip(rows, cached, strict=True):  # logits of the same tokens, one by one and at once
            given = torch.tensor([[EOS, *tokens]])
            at_once = net(pair_of(alone[row], given))[:, : given.shape[1]]
            state, one_by_one = net.start(net.encode(alone[row])), []  # type: ignore[operator, union-attr]
            for token in given.split(1, 1):
                logits, state = net.decode(token, state)  # type: ignore[operator, union-attr]
                one_by_one.append(logits)
            worst = max(worst, float((torch.cat(one_by_one, 1) - at_once).abs().max()))
        return {
            "sentences": COMPARED,
            "cache_changes": sum(self.without_cache(one) != tokens for one, tokens in zip(alone, cached, strict=True)),
            "batch_changes_greedy": sum(greedy(net, a, MAX_LENGTH)[0] != b for a, b in zip(alone, cached, strict=True)),
            "batch_changes_beam": sum(
                beam_search(net, a, *search)[0][0].tokens != b for a, b in zip(alone, beams, strict=True)
            ),
            "largest_difference_of_logits": worst,
        }

    def without_cache(self, source: Tensor) -> list[int]:
        """The likeliest token again and again, the whole sentence computed anew each time."""
        tokens: list[int] = []
        while len(tokens) < MAX_LENGTH:
            logits = self.trained.net(pair_of(source, torch.tensor([[EOS, *tokens]])))[0, len(tokens)]
            logits[PAD] = -torch.inf
            if not tokens:
                logits[EOS] = -torch.inf
            if (token := int(logits.argmax())) == EOS:
                break
            tokens.append(token)
        return tokens

    def exported(self) -> dict[str, Any]:
        """Encoder and step in ONNX Runtime: how they agree with torch, their scores, sizes and time."""
        network = replace(self.trained, net=graph.ready(self.trained.net))
        piece, rows = self.test.piece(range(COMPARED)), list(range(COMPARED))
        source = torch.from_numpy(piece.data[:2, 0, 0]).long()
        graphs, row = translation.graphs_of(network.net, source, "translation"), FORMATS["onnx"]
        ports, cached = translation.ports_of(graphs)
        runners, sizes = {}, {}
        for part, one in graphs.items():
            row.convert(one, self.folder, [])
            path = (self.folder / row.file).rename(self.file(f"{part}.onnx"))
            runners[part], sizes[part] = row.load(path, 1, True), path.stat().st_size
        net = translation.ExportedTranslation(translation.speaker(runners, ports, cached)).eval()
        outside = replace(network, net=net)
        out = translation.compare(network, outside, Samples(piece.data, piece.labels, [""] * COMPARED, rows))
        out |= {"bytes": sizes, **self.score(outside, "export")}
        one = source[:1, : int((source[0] != PAD).sum())]
        with settings(1), torch.inference_mode():
            took = verify.timed_pairs(
                lambda: greedy(net, one, MAX_LENGTH), lambda: greedy(network.net, one, MAX_LENGTH), PAIRS
            )
        return out | {"time": took.to_plain("export", "eager")}


def pair_of(source: Tensor, given: Tensor) -> Tensor:
    """A source and what the decoder is given as a pair int `[1, 2, L]`."""
    length = max(source.shape[1], given.shape[1])
    return torch.stack([functional.pad(one, (0, length - one.shape[1]), value=PAD) for one in (source, given)], 1)


ROWS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "fit": Bench.fit,
    "trained": Bench.scored_as_trained,
    "kmeans8": lambda bench: bench.quantized("kmeans8", "kmeans", 8),
    "kmeans4": lambda bench: bench.quantized("kmeans4", "kmeans", 4),
    "int8": lambda bench: bench.quantized("int8", "int8", 8),
    "decoded": Bench.decoded,
    "exported": Bench.exported,
}


def main() -> None:
    """Print a line per row."""
    print_rows(Bench, ROWS)


if __name__ == "__main__":
    main()
