"""Language modelling: predicts the next token.

Networks take windows of a stream int `[B, L + 1]` and return the log-probabilities of their last L tokens `[B, L]`, so
that nothing of the size of a large vocabulary is allocated, or logits `[B, L, V]`; with a teacher, which is compared
over the whole vocabulary, all log-probabilities (`whole`). A window does not see what precedes it: perplexity is
measured on streams of the length that `prepare` made (`text.stream`), within which a network carries its memory and its
cache, so that it does not depend on the number of workers. Perplexity per word is comparable across tokenizers, per
token it is not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field

from slimray.data.modalities import read_recipe
from slimray.data.samples import BadSample
from slimray.data.text.samples import TextRecipe
from slimray.data.text.vocabulary import EOS, PAD
from slimray.models.text.decoding import continued
from slimray.runs.examples import Texts
from slimray.spec import Spec
from slimray.tasks.evaluation import Pass, Samples
from slimray.tasks.network import Network
from slimray.tasks.task import LOSS, Metric, Outputs
from slimray.tasks.tokens import taught, text_task

GIVEN = 24  # tokens of a stream that is continued in a report
LONGEST = 1 << 16  # most tokens of a line to continue


class LanguageOptions(Spec):
    """Options of the continuation of a text."""

    max_tokens: int = Field(50, ge=1, le=10_000)
    """Most tokens that `predict` adds to a line; it stops at the end of a line."""


def continuation(network: Network, stream: Sequence[int]) -> str:
    """Return the network's continuation of a stream, always the likeliest token, up to the end of a line."""
    recipe: TextRecipe = read_recipe(network.recipe)
    tokens = torch.tensor([stream], device=network.device)
    return recipe.vocabulary.decode(_line(continued(network.net, tokens, recipe.max_tokens)[0].tolist()))


def _line(tokens: list[int]) -> list[int]:
    """Return tokens up to the end of a line."""
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


class LanguagePass(Pass):
    """A pass over streams, which shows how the network continues some."""

    def show(self, samples: Samples, outputs: Outputs | None, before: Any, most: int) -> list[dict]:
        """Return the first tokens of the samples just taken, the network's continuation up to the end of a line, and
        the true continuation."""
        network, rows = self.setting.network, []
        recipe: TextRecipe = read_recipe(network.recipe)
        if not hasattr(network.net, "next_words"):
            return []
        for data in samples.data[: max(0, most - len(before))]:
            tokens = [int(token) for token in data[0] if token != PAD]
            given, rest = tokens[:GIVEN], _line(tokens[GIVEN : GIVEN + recipe.max_tokens])
            texts = [("text", recipe.vocabulary.decode(given)), ("network", continuation(network, given))]
            rows.append(Texts("", [*texts, ("truth", recipe.vocabulary.decode(rest))]).to_plain())
        return rows


def lines(network: Network) -> Callable[[str], str]:
    """Return a function from a line to the line with the network's continuation; BadSample for too long a line."""
    recipe: TextRecipe = read_recipe(network.recipe)

    def one(text: str) -> str:
        tokens = recipe.encode(text)
        if len(tokens) > LONGEST:
            raise BadSample(f"has {len(tokens)} tokens, more than {LONGEST}: give only the end of it")
        return f"{text} {continuation(network, [EOS, *tokens])}".strip()

    return one


LANGUAGE = text_task(
    "language",
    LanguagePass,
    metrics=(
        Metric("perplexity", "perplexity", unit="", better="lower", ratio=True),
        Metric("word_perplexity", "perplexity per word", unit="", better="lower", ratio=True),
        LOSS,
    ),
    lines=lines,
    spec=LanguageOptions,
    searched=True,
    taught=taught,
    in_full={"whole": True},
)
