"""A step over bags of unequal length is the mean over its tokens: two ranks (real gloo processes) equal one."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.ranks import run_ranks

from slimray import models
from slimray.data.plan import Phase, microbatches
from slimray.data.ragged import joined
from slimray.data.text.samples import pair_arrays
from slimray.data.text.vocabulary import PAD
from slimray.data.token_plan import Bags
from slimray.runtime.inputs import Input
from slimray.tasks import TASKS
from slimray.train.methods.distilled import Distilled, DistilledReplica
from slimray.train.methods.method import Piece, Setup
from slimray.train.methods.plain import PlainReplica
from slimray.train.spec import OptimSpec

TASK, CPU = TASKS["translate"], torch.device("cpu")
OPTIM = OptimSpec.model_validate(
    {"lr": 0.1, "reference_batch": 40, "epochs": 1, "groups": "plain", "weight_decay": 0, "label_smoothing": 0.1}
)
RNG = np.random.default_rng(0)
PAIRS = [
    pair_arrays(*(RNG.integers(4, 12, size).astype(np.int32) for size in RNG.integers(1, 9, 2))) for _ in range(31)
]
LENGTHS = np.array([len(wanted) for _, wanted in PAIRS])
BAGS = Bags.of(LENGTHS, 20, seed=1)


def replica(rank: int, world: int) -> PlainReplica:
    torch.manual_seed(0)
    options = {"embed": 8, "qkv": 8, "ffn": 8, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
    net = models.build("transformer", vocab_size=12, **options).double()
    return PlainReplica(net, Setup(OPTIM, Input(), (2, 4), CPU, rank, world, task=TASK))


def steps(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Return the weights after an epoch of steps of three bags."""
    torch.set_default_dtype(torch.float64)
    one = replica(rank, world)
    phase = Phase("train", "train", 0, len(PAIRS), 3, True, {}, bags=BAGS)
    by_length = np.argsort(LENGTHS, kind="stable")
    for step in range(phase.num_steps):
        pieces, tokens = [], 0.0
        for number in range(world):
            for lo, hi in microbatches(phase, step, number, world, 1):
                found = [PAIRS[i] for i in phase.plan.samples(lo, hi, 0, lambda: by_length)]
                if not found:
                    piece = Piece(np.zeros((0,), np.uint8), np.zeros(0, np.int64))
                else:
                    piece = Piece(*(joined([value[None] for value in column], PAD) for column in zip(*found)))
                    tokens += float(TASK.weights(torch.from_numpy(piece.labels), OPTIM).sum())
                pieces += [piece] if number == rank else []
        one.step(pieces, tokens / phase.share(step), 0.1, (0, step))
    return {name: value.clone() for name, value in one.net.state_dict().items()}


def rank_of_two(rank: int, out: str) -> None:
    torch.save(steps(rank, 2), f"{out}/{rank}.pt")


def test_two_ranks_take_the_steps_of_one(tmp_path: Path):
    assert BAGS.count % 3, "the last step is a short one"
    run_ranks(rank_of_two, str(tmp_path))
    default = torch.get_default_dtype()
    try:
        alone, start = steps(0, 1), replica(0, 1).net.state_dict()
    finally:
        torch.set_default_dtype(default)
    for rank in (0, 1):
        ours = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in alone.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-13)
    assert any(not torch.equal(value, start[name]) for name, value in alone.items())


def test_padding_and_the_sentences_beside_it_change_no_loss():
    torch.manual_seed(0)
    net = replica(0, 1).net.eval()
    alone = [TASK.losses(net(torch.from_numpy(s)), torch.from_numpy(w)[None], OPTIM)[0] for s, w in PAIRS[:6]]
    data, labels = (joined([value[None] for value in column], PAD) for column in zip(*PAIRS[:6]))
    together = TASK.losses(net(torch.from_numpy(data[:, 0])), torch.from_numpy(labels), OPTIM)
    assert torch.stack(alone).detach().numpy() == pytest.approx(together.detach().numpy(), rel=1e-5)


def test_soft_labels_of_a_teacher_weigh_tokens_as_labels_do():
    """Padding has no effect on the loss, and a confident teacher acts like a label."""
    torch.manual_seed(1)
    own, targets = torch.randn(2, 4, 12, requires_grad=True), torch.tensor([[5, 6, 2, PAD], [7, 2, PAD, PAD]])
    sure = torch.full((2, 4, 12), -50.0).scatter_(2, targets[..., None], 50.0)
    plain = OPTIM.model_copy(update={"label_smoothing": 0.0})
    assert TASK.taught is not None
    taught = TASK.taught(sure, own, targets)
    assert torch.allclose(taught, TASK.losses(own, targets, plain), atol=1e-5)
    (gradient,) = torch.autograd.grad(taught.sum(), own)
    assert not gradient[targets == PAD].any()
    assert gradient[targets != PAD].abs().sum(-1).min() > 0
    (gradient,) = torch.autograd.grad(TASK.taught(own.detach(), own, targets).sum(), own)
    assert gradient.abs().max() < 1e-6, "its own answers teach a network nothing"


@pytest.mark.parametrize("cache", [0, 9])
def test_a_language_model_is_taught_over_all_words_though_its_loss_needs_one(cache):
    """Teacher and student may differ in size and form; the loss of a step combines labels and teacher."""
    task = TASKS["language"]
    torch.manual_seed(0)
    teacher = models.build("transformer_lm", vocab_size=30, embed=8, ffn=8, heads=2, layers=1, dropout=0.0)
    net = models.build("micronet_lm", vocab_size=30, preset="tiny", cache=cache)
    before, optim = copy.deepcopy(net), OPTIM.model_copy(update={"label_smoothing": 0.0, "clip_norm": None})
    tokens = torch.randint(4, 30, (3, 12))
    tokens[0, 8:] = PAD
    labels, there = tokens[:, 1:], tokens[:, 1:] != PAD
    method = Distilled("", weight=0.5, labels=0.3)
    replica = DistilledReplica(net, teacher, method, Setup(optim, Input(), (12,), CPU, task=task))
    piece = Piece(tokens[:, None].int().numpy(), labels.numpy())
    report = replica.step([piece], float(there.sum()), 0.1, (0, 0))
    with torch.no_grad():
        given, log_probs = teacher(tokens).softmax(-1), before(tokens, whole=True).log_softmax(-1)
        told = 0.3 * log_probs.gather(-1, labels[..., None])[..., 0] + 0.5 * (given * log_probs).sum(-1)
    assert report.loss_sum == pytest.approx(-float(told[there].sum()), rel=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("micronet_lm", {"preset": "tiny"}),
        ("micronet_lm", {"preset": "tiny", "cache": 5}),
        ("transformer_lm", {"embed": 8}),
    ],
)
@torch.no_grad()
def test_what_a_teacher_is_compared_with_holds_what_the_loss_needs(name, options):
    torch.manual_seed(0)
    net, tokens = models.build(name, vocab_size=30, **options).eval(), torch.randint(4, 30, (2, 15))
    whole, own = net(tokens, **TASKS["language"].in_full), net(tokens)
    assert whole.shape == (2, 14, 30)
    own = own if own.ndim == 2 else own.gather(-1, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(whole.gather(-1, tokens[:, 1:, None])[..., 0], own, atol=1e-5)
