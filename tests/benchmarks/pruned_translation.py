"""The trained translation network with fewer heads and feed-forward channels, fine-tuned for one epoch or more.

`SLIMRAY_BENCH_DIR=... python -m tests.benchmarks pruned_translation`, in the folder in which `translation` has trained
its network (SLIMRAY_SEEDS, SLIMRAY_ROWS as there). `compress.prune` removes what its criterion finds least important, a
head or a channel at a time, down to the share of the multiply-accumulates that a row names (counted for pairs of 17
tokens, output matrix included); then the remaining weights learn from the labels and from the whole network. Scores are
those of `translation`: BLEU of test_2016_flickr, compared sentence by sentence with the whole network's.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from tests.benchmarks import translation
from tests.benchmarks.kept import Row, print_rows
from torch import nn

from slimray import compress
from slimray.compress.pruning import Pruned, compare
from slimray.data.plan import Phase, microbatches
from slimray.data.text.vocabulary import PAD
from slimray.data.token_plan import Bags
from slimray.runtime.inputs import Input
from slimray.train import optimizers
from slimray.train.methods.distilled import Distilled, DistilledReplica
from slimray.train.methods.method import Setup

FINETUNE = {"lr": 0.001, "warmup_steps": 50, "schedule": "cosine", "ema": None}
PAIRS = 21


class Bench(translation.Bench):
    """The network of `translation` of one seed, and smaller ones."""

    def pruned(self, share: float) -> Pruned:
        """Cut to a share of the multiply-accumulates, by the importance of groups over all layers."""
        example = torch.from_numpy(self.val.piece(self.val.by_length[500:502]).data[:, 0])
        return compress.prune(
            self.trained.net,
            example,
            policy="ranked",
            criterion="group",
            shares={"macs": share},
            round_to=1,
            timed=False,
        )

    def fine_tuned(self, net: nn.Module, epochs: int) -> tuple[nn.Module, float]:
        """The network after its further training, and the minutes of processor time that took."""
        job, begun = self.job, time.process_time()
        optim = job.optim.model_copy(update={**FINETUNE, "epochs": epochs})
        setup = Setup(optim, Input(), (2, 32), translation.CPU, batch_total=job.batch["tokens"], task=translation.TASK)
        replica = DistilledReplica(net, self.trained.net, Distilled("", weight=0.5, labels=0.5), setup)
        bags, done = Bags.of(self.train.lengths, job.batch["per_worker_tokens"], self.seed), 0
        for epoch in range(epochs):
            phase = Phase("train", "train", epoch, len(self.train.pairs), 1, True, {}, bags=bags)
            for step in range(phase.num_steps):
                ((lo, hi),) = microbatches(phase, step, 0, 1, 1)
                piece = self.train.piece(phase.plan.samples(lo, hi, self.seed, lambda: self.train.by_length))
                rate = optimizers.learning_rate(optim, job.batch["tokens"], 1, 0, done, phase.num_steps)
                report = replica.step([piece], float((piece.labels != PAD).sum()), rate, (self.seed, done))
                assert report.finite
                if done % 100 == 0:
                    print(f"step {done}: loss {report.loss_sum / (piece.labels != PAD).sum():.3f}", flush=True)
                done += 1
        return replica.averaged(), (time.process_time() - begun) / 60

    def scored_pruned(self, percent: int, epochs: int = 1) -> dict[str, Any]:
        """A row: what is left, perplexities before and after, BLEU after, and the time of a pass against the whole."""
        made = self.pruned(percent / 100)
        model = {**self.model, "compression": [made.record]}
        name = f"pruned{percent}" + (f"-{epochs}" if epochs > 1 else "")
        before, file = self.perplexity(self.network(made.net, model), self.test), self.file(f"{name}.pt")
        if not file.exists():
            net, minutes = self.fine_tuned(made.net, epochs)
            torch.save({"net": net.state_dict(), "minutes": minutes}, file)
        kept = torch.load(file, weights_only=True)
        made.net.load_state_dict(kept["net"])
        network, size = self.written(made.net, model, name)
        example = torch.from_numpy(self.val.piece(self.val.by_length[500:532]).data[:, 0])
        gain = compare(self.trained.net, network.net, example, PAIRS)
        return {
            "left": {name: made.after[name] / made.before[name] for name in made.before},
            "heads": sum(count for name, count in made.counts.items() if "attn" in name),
            "channels": sum(count for name, count in made.counts.items() if "ffn" in name),
            "core_minutes": kept["minutes"],
            "bytes": size,
            "perplexity_before": before,
            "perplexity": self.perplexity(network, self.test),
            "times_as_fast": asdict(gain),
            **self.score(network, name),
        }


ROWS: dict[str, Callable[[Bench], Row]] = {
    "pruned75": lambda bench: bench.scored_pruned(75),
    "pruned75-4": lambda bench: bench.scored_pruned(75, 4),
}


def main() -> None:
    """Print a line per row."""
    print_rows(Bench, ROWS, "pruned.jsonl")


if __name__ == "__main__":
    main()
