"""Words of a language model move by Hebb's rule as computed word by word, on any number of ranks and after a resume."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests.ranks import run_ranks

from slimray import models
from slimray.data.text.vocabulary import PAD
from slimray.spec import UserError, parse
from slimray.tasks import TASKS
from slimray.tasks.network import Input
from slimray.train.methods.hebbian import Hebbian, HebbianReplica, applies
from slimray.train.methods.method import Piece, Setup
from slimray.train.spec import OptimSpec
from slimray.verbs.specs import TrainJob

VOCAB, MOST = 40, 4
FIELDS = {"optimizer": "adam", "lr": 0.01, "reference_batch": 1, "epochs": 1, "groups": "plain", "weight_decay": 0}


def network() -> Any:
    torch.manual_seed(0)
    return models.build("micronet_lm", vocab_size=VOCAB, preset="tiny")


def replica(rank: int = 0, world: int = 1) -> HebbianReplica:
    optim = OptimSpec.model_validate(FIELDS | {"hebbian": MOST})
    setup = Setup(optim, Input(), (7,), torch.device("cpu"), rank, world, task=TASKS["language"])
    return Hebbian(MOST).replica(network(), network, setup)


def piece(step: int, rows: slice = slice(None)) -> Any:
    """Return four windows of six words, the last two shorter."""
    tokens = np.random.default_rng(step).integers(4, VOCAB, (4, 7)).astype(np.int32)
    tokens[2:, 5:] = PAD
    return Piece(tokens[rows, None], tokens[rows, 1:].astype(np.int64))


def words_of(net: Any) -> torch.Tensor:
    return torch.cat([table.weight.detach().flatten() for table in net.embed.layers])


def by_hand(net: Any, one: Any, seen: dict[int, int]) -> None:
    """Move the words of `net` by the rule, one after the other."""
    tokens = torch.from_numpy(one.data[:, 0]).long()
    heard: dict[int, list[torch.Tensor]] = {}
    hidden = net.hidden(tokens[:, :-1], net.start())[0].detach()
    for row, place in np.ndindex(*one.labels.shape):
        if one.labels[row, place] != PAD:
            heard.setdefault(int(one.labels[row, place]), []).append(hidden[row, place])
    edges = net.embed.edges
    for word, vectors in heard.items():
        number = max(i for i, edge in enumerate(edges) if word >= edge)
        row = net.embed.layers[number].weight.data[word - edges[number]]
        if number:
            vectors = [net.softmax.projections[number - 1].weight.detach() @ vector for vector in vectors]
        mean = sum(vector * (row.norm() / vector.norm()) for vector in vectors) / len(vectors)
        share = max(1 / seen.get(word, 1), 0.01) if seen.get(word, 1) < MOST else 0.0
        row += share * (mean - row)
        seen[word] = seen.get(word, 1) + len(vectors)


def test_words_move_by_the_rule_as_computed_word_by_word():
    made, wanted, seen = replica(), network(), {}
    for step in range(4):
        before = words_of(made.net)
        assert made.step([piece(step)], 20.0, 0.0, (0, step)).finite  # at a learning rate of 0 nothing else moves
        by_hand(wanted, piece(step), seen)
        assert float((words_of(made.net) - before).abs().max()) > 0.01
        torch.testing.assert_close(words_of(made.net), words_of(wanted), rtol=1e-4, atol=1e-6)
    counts = torch.cat(made.counts)
    assert {word: int(count) for word, count in enumerate(counts) if count > 1} == seen
    assert max(seen.values()) > MOST, "some move no more"


def test_a_training_that_was_kept_goes_on_as_the_one_that_was_not_interrupted():
    one, other = replica(), replica()
    one.step([piece(0)], 20.0, 0.01, (0, 0))
    other.load({name: value.clone() for name, value in one.tensors().items()})
    for made in (one, other):
        made.step([piece(1)], 20.0, 0.01, (0, 1))
    assert torch.equal(words_of(one.net), words_of(other.net))
    assert all(torch.equal(a, b) for a, b in zip(one.counts, other.counts, strict=True))


def _on_a_rank(rank: int) -> None:
    made, alone = replica(rank, 2), replica()
    for step in range(3):
        halves = [piece(step, slice(0, 2)), piece(step, slice(2, 4))]
        made.step([halves[rank]], 20.0, 0.0, (0, step))
        alone.step(halves, 20.0, 0.0, (0, step))
        torch.testing.assert_close(words_of(made.net), words_of(alone.net), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(made.counts, alone.counts, strict=True))


def test_the_sums_are_those_of_all_ranks():
    run_ranks(_on_a_rank)


def test_a_validation_is_not_learned_from():
    made = replica()
    with torch.no_grad():
        copy.deepcopy(made.net)(torch.from_numpy(piece(0).data[:, 0]))
        made.net(torch.from_numpy(piece(0).data[:, 0]))
    assert not made.chunks


JOB: dict[str, Any] = {
    "kind": "train", "name": "x", "data": {"run": "y"}, "model": {"name": "micronet_lm"},
    "batch": {"total": 1, "per_worker": 1}, "optim": FIELDS | {"hebbian": 500},
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"optim": JOB["optim"] | {"ema": 0.9}},
            "optim.hebbian: is for plain training and cannot be combined with ema",
        ),
        ({"teacher": "z"}, "optim.hebbian: is for plain training and cannot be combined with teacher"),
        (
            {"scale": {"compile": True}},
            "optim.hebbian: is for plain training and cannot be combined with scale.compile",
        ),
    ],
)
def test_where_the_rule_does_not_apply_is_a_sentence(more, said):
    parse(TrainJob, JOB, "x.yaml")
    with pytest.raises(UserError, match=said):
        parse(TrainJob, JOB | more, "x.yaml")


def test_only_an_adaptive_softmax_has_words_that_move():
    assert applies(network())
    assert not applies(models.build("transformer_lm", vocab_size=VOCAB, embed=8, ffn=8, heads=2, layers=1))
