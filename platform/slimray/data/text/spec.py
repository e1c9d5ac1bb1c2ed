"""Fields about text: how `prepare` makes tokens of it, and what a prepared card says of them."""

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from slimray.data.text.vocabulary import SPECIAL, Kind
from slimray.spec import Spec

TRAIN = "train"  # the split that a vocabulary is trained on, and whose samples are bounded in length
LIKE = ("tokenizer", "vocab_size", "lower")  # fields of a tokenizer, which are those of the run that `like` names


class TextSpec(Spec):
    """Conversion of texts to tokens."""

    tokenizer: Kind = "unigram"
    """`unigram` or `bpe`: pieces of words, learned by SentencePiece from both sides of the training split (of more than
    2,000,000 sentences, from so many drawn evenly); `words`: what stands between white space, for texts that are
    tokenised already, such as the Penn Treebank."""
    vocab_size: int = Field(8000, ge=len(SPECIAL) + 1, le=1_000_000)
    """Tokens, bos, pad, eos and unk included; fewer where the texts have no more."""
    like: str | None = None
    """A `prepare` run whose tokenizer is taken in place of one of its own, by name or URI, with its `lower`: to score
    networks that were trained on that dataset on this one, or to go on training them."""
    lower: bool = False
    """Learn lower-case text, and score translations without case, as the published IWSLT'14 results do."""
    max_tokens: int = Field(250, ge=2, le=8192)
    """Tokens of the longer side of a pair, its end included; longer pairs of split `train` are left out, others cut."""
    max_ratio: float | None = Field(None, ge=1)
    """Pairs of split `train` with one side more than so many times as long as the other, in tokens, are left out."""
    length: int = Field(256, ge=8, le=65536)
    """Tokens of a training sample of plain text: a window of the stream of all lines, each with an end; where windows
    begin changes from epoch to epoch."""
    stream: int | None = Field(None, ge=8, le=1_000_000)
    """Tokens of a sample of the other splits: a stream over which a network carries its memory. Default `length`."""

    @model_validator(mode="after")
    def _like_says_it_all(self) -> "TextSpec":
        given = [name for name in LIKE if name in self.model_fields_set]
        if self.like is not None and given:
            raise ValueError(f"{given[0]}: is that of the run that `like` names: leave it out")
        return self

    @model_serializer(mode="wrap")
    def _without_what_like_says(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in default(self).items() if self.like is None or name not in LIKE}


class PreparedText(Spec):
    """Tokens that `prepare` made of texts; part of the card that it writes."""

    tokenizer: str
    """File of the vocabulary beside the card; the vocabulary itself once the card is opened."""
    vocab_size: int = Field(ge=1)
    """Tokens of the vocabulary."""
    lengths: dict[str, int]
    """Tokens of the longest sample of each split."""
    lower: bool = False
    """Whether tokens are those of lower-case text; the texts themselves are stored as they were written."""
