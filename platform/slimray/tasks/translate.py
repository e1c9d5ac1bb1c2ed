"""Translation of sentences into another language.

Networks take pairs int `[B, 2, L]` (the source, and the decoder's input) and return logits `[B, L, V]`; targets are
int64 `[B, L]`. Loss and perplexity are those of the reference tokens, each given the ones before it. BLEU and chrF
score the network's own translations, by beam search, as text against the original references (never rebuilt from
tokens); sacrebleu computes them over all sentences, ignoring case if the network was trained on lower-case text, and
its signature, which records that, is reported with them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from slimray.data.modalities import read_recipe
from slimray.data.text.samples import TextRecipe, index_rows, raw_texts
from slimray.data.text.vocabulary import PAD
from slimray.models.text.decoding import beam_search, greedy
from slimray.runs.examples import Texts
from slimray.runtime.translate import TranslateOptions, translator
from slimray.tasks.evaluation import Pass, Samples
from slimray.tasks.network import Network
from slimray.tasks.task import LOSS, Metric, Outputs, PassResult, Table
from slimray.tasks.text_scores import DRAWS, CorpusMetric, Counts, paired_bootstrap
from slimray.tasks.tokens import taught, text_task

SCORES: tuple[Literal["bleu", "chrf"], ...] = ("bleu", "chrf")


def translations(network: Network, sources: np.ndarray) -> list[str]:
    """Return the translations of sentences int `[n, S]`, each with its eos and padded with PAD, as text."""
    recipe: TextRecipe = read_recipe(network.recipe)
    return [recipe.vocabulary.decode(one) for one in searched(network, sources)]


def searched(network: Network, sources: np.ndarray) -> Sequence[Sequence[int]]:
    """Return the translations of sentences int `[n, S]` as tokens, with the search options of the network's recipe."""
    recipe: TextRecipe = read_recipe(network.recipe)
    tokens = torch.from_numpy(np.ascontiguousarray(sources)).long().to(network.device)
    tokens = tokens[:, : int((tokens != PAD).sum(1).max())]
    if recipe.beam == 1:
        return greedy(network.net, tokens, recipe.max_length)
    found = beam_search(network.net, tokens, recipe.beam, recipe.length_penalty, recipe.max_length)
    return [best[0].tokens if best else () for best in found]


@dataclass(frozen=True)
class Counted:
    """BLEU counts `[n, k]` of the sentences that a network translated, with their row numbers and the metric."""

    numbers: tuple[int, ...]
    metric: CorpusMetric
    counts: Counts


class TranslationPass(Pass):
    """A pass that also translates; `found` are pairs of the row number of a sample and its translation."""

    def take(self, samples: Samples) -> Outputs | None:
        """Count samples and translate them."""
        super().take(samples)
        said = translations(self.setting.network, samples.data[:, 0, 0])
        self.found += list(zip(map(int, samples.numbers), said, strict=True))
        return None

    def show(self, samples: Samples, outputs: Outputs | None, before: Sequence[dict], most: int) -> list[dict]:
        """Return the samples just taken as text."""
        count = min(len(samples), most - len(before))
        said = dict(self.found[-len(samples) :])
        recipe: TextRecipe = read_recipe(self.setting.network.recipe)
        rows = []
        for number, data, wanted in zip(samples.numbers[: max(0, count)], samples.data, samples.targets):
            source, reference = (recipe.vocabulary.decode(tokens) for tokens in (data[0, 0], wanted))
            texts = [("source", source), ("network", said.get(int(number), "")), ("reference", reference)]
            rows.append(Texts("", texts).to_plain())
        return rows


def finish(row: dict[str, Any], result: PassResult) -> list[dict[str, Any]]:
    """Add BLEU and chrF to a row, for the translations of all ranks against the texts of the split."""
    if result.found:
        said = dict(result.found)
        rows = index_rows(result.root, result.split, sorted(said))
        references = [translation for _, translation in raw_texts(result.root, rows)]
        hypotheses = [said[number] for number in sorted(said)]
        row["signatures"] = {}
        for name in SCORES:
            metric = CorpusMetric(name, lower=bool(result.recipe.get("lower")))
            counts = metric.counts(hypotheses, references)
            score = metric.score(counts.sum(0))
            row[name] = score.value
            row["signatures"][name] = score.signature
            if name == "bleu":
                row["counted"] = Counted(tuple(sorted(said)), metric, counts)
    return result.examples


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add `bleu_gain` to rows: their lead over the first row, by a paired bootstrap over sentences.

    Rows with other sentences or another metric (ignoring case) are not compared.
    """
    counted = [(row, row.pop("counted")) for row in rows if "counted" in row]
    for row, one in counted[1:]:
        baseline, first = counted[0]
        if row["run"] != baseline["run"] and (one.numbers, one.metric) == (first.numbers, first.metric):
            gain = paired_bootstrap(one.metric, one.counts, first.counts)
            row["bleu_gain"] = {"over": baseline["run"], **vars(gain)}


def lines(network: Network) -> Callable[[str], str]:
    """Return a function from a line to its translation; BadSample for a line longer than the sentences of training."""
    recipe: TextRecipe = read_recipe(network.recipe)
    return translator(recipe, lambda source: searched(network, source)[0])


def tables(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Table]:
    """Return tables of BLEU and chrF with the signatures that make them reproducible, and of their differences."""
    scored = [row for row in rows if "signatures" in row]
    cells = [(row["run"], name, row[name], row["signatures"][name]) for row in scored for name in SCORES]
    note = "Over all sentences, by sacrebleu, against the original references."
    made = [Table("Scores of translations", ("run", "score", "value", "signature"), cells, note)] if cells else []
    gains = [
        (row["run"], gain["over"], gain["difference"], f"{gain['low']:+.2f} to {gain['high']:+.2f}")
        for row in rows
        if (gain := row.get("bleu_gain"))
    ]
    if gains:
        note = f"A paired bootstrap (Koehn 2004): the sentences of both are resampled {DRAWS:,} times."
        header = ("run", "compared with", "difference of BLEU", "95 % interval")
        made.append(Table("Differences of BLEU", header, gains, note))
    return made


TRANSLATE = text_task(
    "translate",
    TranslationPass,
    metrics=(
        Metric("perplexity", "perplexity", unit="", better="lower", ratio=True),
        Metric("bleu", "BLEU", unit=""),
        Metric("chrf", "chrF", unit=""),
        LOSS,
    ),
    lines=lines,
    stepwise=True,
    searched=True,
    taught=taught,
    spec=TranslateOptions,
    finish=finish,
    compare=compare,
    extra="text",
    modules=("sacrebleu",),
    tables=tables,
    in_tables=frozenset({"signatures", "bleu_gain"}),
)
