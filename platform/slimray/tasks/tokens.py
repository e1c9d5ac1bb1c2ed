"""Losses and counts over tokens, which the tasks of text share: every token that is not PAD weighs the same.

Logits are `[n, L, V]`, targets int64 `[n, L]`. A language model may give the log-probability of each target `[n, L]`
in their place, so that nothing of the size of a large vocabulary is made.
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
    """The tokens that are to be predicted."""
    return Target((int(recipe["length"]),), "int64", PAD)


def arguments(card: Any, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how many tokens there are; None until the dataset is prepared."""
    return None if card.text is None else {"vocab_size": card.text.vocab_size}


def weights(targets: Tensor, options: LossOptions) -> Tensor:
    """Return how many tokens of each sample are to be predicted, `[n]`."""
    return (targets != PAD).sum(1).float()


def losses(outputs: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """Return the cross-entropy of each sample, summed over its tokens `[n]`; smoothed over all classes if wanted."""
    return token_losses(outputs, targets, options.label_smoothing).sum(1)


def token_losses(outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy at each target `[n, L]` in nats, 0 at PAD.

    Smoothing gives all classes, the target too, an equal share. RunFailed for log-probabilities of the targets alone,
    which cannot be smoothed.
    """
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    if outputs.shape == targets.shape:
        if smoothing:
            raise RunFailed(
                "optim.label_smoothing: this network tells of the next token alone, which cannot be smoothed: write 0"
            )
        return torch.where(targets == PAD, 0.0, -outputs)
    flat = nn.functional.cross_entropy(
        outputs.flatten(0, 1), targets.flatten(), ignore_index=PAD, label_smoothing=smoothing, reduction="none"
    )
    return flat.view(targets.shape)


def taught(given: Tensor, own: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of logits `own` against those of a teacher, both `[n, L, V]`, summed over the tokens of
    each sample `[n]` (soft labels, arXiv 1503.02531). Log-probabilities are logits too; the gradient goes to `own`
    alone."""
    soft, log_probs = given.detach().float().softmax(-1), own.float().log_softmax(-1)
    return torch.where(targets == PAD, 0.0, -(soft * log_probs).sum(-1)).sum(1)


def no_examples(network: Any, views: Any, outputs: Any, targets: Any, shown: int) -> Iterable[dict[str, Any]]:
    """Return nothing: the passes of the tasks of text show what they have found."""
    return ()


def no_files(model: Any, options: Any) -> Any:
    """Raise UserError: texts are answered line by line (`Task.lines`)."""
    raise UserError("this network answers lines of text: predict with the run that it was trained by")


@functools.lru_cache(maxsize=8)
def word_ends(vocabulary: Vocabulary) -> Tensor:
    """Return which tokens begin a word or end a line, bool `[V]`: there are as many as words and lines."""
    return torch.tensor([token == EOS or vocabulary.begins_word(token) for token in range(vocabulary.size)])


def vocabulary_of_recipe(recipe: Mapping[str, Any]) -> Vocabulary | None:
    """Return the vocabulary of a plain recipe, None for one without."""
    return vocabulary_of(recipe["tokenizer"]) if recipe.get("tokenizer") else None


class TokenScore:
    """Sums over tokens, to be summed over ranks. A sample with an output that is not finite is counted apart."""

    def __init__(self, vocabulary: Vocabulary | None = None):
        self.sums = torch.zeros(5, dtype=torch.float64)  # nll, tokens, words, samples, not finite
        self.words = None if vocabulary is None else word_ends(vocabulary)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count the outputs of samples against their targets; samples without any are left out."""
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
        """perplexity (per token) and word_perplexity, loss (nats per token), num_tokens, num_samples; num_not_finite if
        there is any, and then nothing is known of the rest."""
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
    """Return a task of text: losses and counts are those of its tokens, `passes` makes what an evaluation counts and
    shows, and the other fields of `Task` are given."""
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
