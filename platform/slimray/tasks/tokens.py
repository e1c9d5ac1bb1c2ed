"""Losses and counts over tokens, shared by the text tasks: every token that is not PAD has the same weight.

Logits are `[n, L, V]`, targets int64 `[n, L]`. A language model may return the log-probability of each target `[n, L]`
instead of logits, so that nothing of the size of a large vocabulary is allocated.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimray.data.modalities import Target
from slimray.data.text.vocabulary import EOS, PAD, Vocabulary, vocabulary_of
from slimray.spec import RunFailed, UserError
from slimray.tasks.evaluation import Pass, Setting
from slimray.tasks.task import LossOptions, Task
from slimray.tasks.text_scores import perplexity


def target(recipe: Mapping[str, Any]) -> Target:
    """Return the target: the tokens to be predicted."""
    return Target((int(recipe["length"]),), "int64", PAD)


def arguments(card: Any, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the size of the vocabulary; None until the dataset is prepared."""
    return None if card.text is None else {"vocab_size": card.text.vocab_size}


def weights(targets: Tensor, options: LossOptions) -> Tensor:
    """Return the number of tokens to be predicted in each sample, `[n]`."""
    return (targets != PAD).sum(1).float()


def losses(outputs: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """Return the cross-entropy of each sample, summed over its tokens `[n]`, with label smoothing if wanted."""
    return token_losses(outputs, targets, options.label_smoothing).sum(1)


def token_losses(outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy at each target `[n, L]` in nats, 0 at PAD.

    Smoothing gives all classes, including the target, an equal share. Raises RunFailed for log-probabilities of only
    the targets, which cannot be smoothed.
    """
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    if outputs.shape == targets.shape:
        if smoothing:
            raise RunFailed(
                "optim.label_smoothing: this network returns only the probability of the target, which cannot be "
                "smoothed: set it to 0"
            )
        return torch.where(targets == PAD, 0.0, -outputs)
    flat = nn.functional.cross_entropy(
        outputs.flatten(0, 1), targets.flatten(), ignore_index=PAD, label_smoothing=smoothing, reduction="none"
    )
    return flat.view(targets.shape)


def taught(given: Tensor, own: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of logits `own` against those of a teacher, both `[n, L, V]`, summed over the tokens of
    each sample `[n]` (soft labels, arXiv 1503.02531). Log-probabilities work as logits; only `own` gets a gradient."""
    soft, log_probs = given.detach().float().softmax(-1), own.float().log_softmax(-1)
    return torch.where(targets == PAD, 0.0, -(soft * log_probs).sum(-1)).sum(1)


def no_examples(network: Any, views: Any, outputs: Any, targets: Any, shown: int) -> Iterable[dict[str, Any]]:
    """Return nothing, because the passes of text tasks make their examples themselves."""
    return ()


def no_files(model: Any, options: Any) -> Any:
    """Raise UserError, because texts are answered line by line (`Task.lines`)."""
    raise UserError("this network answers lines of text: predict with the run that trained it")


@functools.lru_cache(maxsize=8)
def word_ends(vocabulary: Vocabulary) -> Tensor:
    """Return a mask bool `[V]` of the tokens that begin a word or end a line, so that they count words and lines."""
    return torch.tensor([token == EOS or vocabulary.begins_word(token) for token in range(vocabulary.size)])


def vocabulary_of_recipe(recipe: Mapping[str, Any]) -> Vocabulary | None:
    """Return the vocabulary of a plain recipe, None if it has none."""
    return vocabulary_of(recipe["tokenizer"]) if recipe.get("tokenizer") else None


class TokenScore:
    """Sums over tokens, added up over ranks. Samples with outputs that are not finite are counted separately."""

    def __init__(self, vocabulary: Vocabulary | None = None):
        self.sums = torch.zeros(5, dtype=torch.float64)  # nll, tokens, words, samples, not finite
        self.words = None if vocabulary is None else word_ends(vocabulary)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count the outputs of samples against their targets; samples without targets are ignored."""
        known = (targets != PAD).any(1)
        outputs, targets = outputs[known], targets[known]
        if not len(targets):
            return
        found = token_losses(outputs, targets)
        finite = found.isfinite().all(1)
        there = targets != PAD
        words = there if self.words is None else self.words.to(targets.device)[targets] & there
        counts = [one[finite].double().sum() for one in (found, there, words)]
        self.sums += torch.stack([*counts, finite.double().sum(), (~finite).double().sum()]).cpu()

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what must be summed over ranks, in place."""
        return (self.sums,)

    def result(self) -> dict[str, Any]:
        """Return perplexity (per token), word_perplexity, loss (nats per token), num_tokens, num_samples.

        num_not_finite is added if there are any such samples; the first three are then nan.
        """
        nll, tokens, words, samples, lost = self.sums.tolist()
        nll = nll if not lost else float("nan")
        row = {
            "perplexity": perplexity(nll, tokens),
            "word_perplexity": perplexity(nll, words),
            "loss": nll / max(tokens, 1),
            "num_tokens": int(tokens),
            "num_samples": int(samples + lost),
        }
        return row | ({"num_not_finite": int(lost)} if lost else {})


def text_task(name: str, passes: Callable[[Setting, TokenScore], Pass], **fields: Any) -> Task:
    """Return a text task: losses and counts are those of its tokens, `passes` makes the pass of an evaluation, and
    `fields` are the other fields of `Task`."""
    return Task(
        name=name,
        target=target,
        arguments=arguments,
        losses=losses,
        weights=weights,
        score=lambda num_classes, recipe: TokenScore(vocabulary_of_recipe(recipe)),
        start=lambda setting: passes(setting, TokenScore(vocabulary_of_recipe(setting.recipe))),
        examples=no_examples,
        answer=no_files,
        **fields,
    )
