"""Fields about text: its conversion to tokens by `prepare`, and the description of tokens in a prepared card."""

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from slimray.data.text.vocabulary import SPECIAL, Kind
from slimray.spec import Spec

TRAIN = "train"  # the split on which a vocabulary is trained, and whose samples are limited in length
LIKE = ("tokenizer", "vocab_size", "lower")  # fields taken over from the run that `like` names


class TextSpec(Spec):
    """Conversion of texts to tokens."""

    tokenizer: Kind = "unigram"
    """`unigram` or `bpe`: pieces of words, learned by SentencePiece from both sides of the training split (at most
    2,000,000 sentences, drawn uniformly); `words`: words between white space, for texts that are already tokenized,
    such as the Penn Treebank."""
    vocab_size: int = Field(8000, ge=len(SPECIAL) + 1, le=1_000_000)
    """Number of tokens, including bos, pad, eos and unk; fewer if the texts do not have as many."""
    like: str | None = None
    """A `prepare` run, by name or URI, whose tokenizer and `lower` are used instead of new ones: to score networks that
    were trained on that dataset on this one, or to continue their training."""
    lower: bool = False
    """Learn lower-case text, and score translations without case, as for the published IWSLT'14 results."""
    max_tokens: int = Field(250, ge=2, le=8192)
    """Maximum tokens of the longer side of a pair, including its end; longer pairs of split `train` are left out, those
    of other splits are cut."""
    max_ratio: float | None = Field(None, ge=1)
    """Maximum ratio of the lengths of the two sides, in tokens; other pairs of split `train` are left out."""
    length: int = Field(256, ge=8, le=65536)
    """Tokens of a training sample of plain text: a window of the stream of all lines, each with an end; the starts of
    windows change from epoch to epoch."""
    stream: int | None = Field(None, ge=8, le=1_000_000)
    """Tokens of a sample of the other splits: a stream over which a network carries its memory. Default: `length`."""

    @model_validator(mode="after")
    def _like_says_it_all(self) -> "TextSpec":
        given = [name for name in LIKE if name in self.model_fields_set]
        if self.like is not None and given:
            raise ValueError(f"{given[0]}: is taken from the run that `like` names: leave it out")
        return self

    @model_serializer(mode="wrap")
    def _without_what_like_says(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in default(self).items() if self.like is None or name not in LIKE}


class PreparedText(Spec):
    """Tokens that `prepare` made from texts; part of the card that it writes."""

    tokenizer: str
    """File of the vocabulary beside the card; the vocabulary itself once the card is opened."""
    vocab_size: int = Field(ge=1)
    """Number of tokens of the vocabulary."""
    lengths: dict[str, int]
    """Tokens of the longest sample of each split."""
    lower: bool = False
    """True if tokens are those of lower-case text; the texts themselves are stored unchanged."""
