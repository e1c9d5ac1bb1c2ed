"""Vocabularies: text survives a round trip, special tokens have fixed numbers, and stored vocabularies are checked."""

import base64
import zlib

import pytest

from slimray.data.text import vocabulary as vocabularies
from slimray.data.text.vocabulary import BOS, EOS, PAD, SPECIAL, UNK, Vocabulary, train_vocabulary, vocabulary_of
from slimray.spec import RunFailed, UserError

TEXTS = ["the dog runs to the house .", "a man walks the dog .", "ein Hund läuft.", "der Mann geht mit dem Hund."] * 9


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_pieces_give_a_text_back_as_it_was_written(kind):
    vocabulary = train_vocabulary(TEXTS, kind, 60)
    assert vocabulary.size <= 60
    for text in (*TEXTS[:4], "Hund  Mann"):
        tokens = vocabulary.encode(text)
        assert min(tokens) > UNK
        assert vocabulary.decode([BOS, *tokens, EOS, PAD, PAD]) == " ".join(text.split())
    assert UNK in vocabulary.encode("漢字")
    assert vocabulary.encode_all(TEXTS[:3]) == [vocabulary.encode(text) for text in TEXTS[:3]]
    again = vocabulary_of(vocabulary.to_text())
    assert (again.size, again.encode("der Hund")) == (vocabulary.size, vocabulary.encode("der Hund"))
    assert train_vocabulary(TEXTS, kind, 60).data == vocabulary.data


@pytest.mark.parametrize("kind", ["unigram", "bpe", "words"])
def test_there_are_as_many_beginnings_as_words(kind):
    vocabulary = train_vocabulary(TEXTS, kind, 60)
    for text in (*TEXTS[:4], "Hund 漢字 läuft 漢字", "漢字", "ein漢 Hund漢字Hund"):
        tokens = vocabulary.encode(text)
        assert sum(map(vocabulary.begins_word, [BOS, *tokens, EOS, PAD])) == len(text.split()), text
    assert UNK in vocabulary.encode("漢字")


def test_words_are_numbered_by_how_often_they_occur():
    vocabulary = train_vocabulary(["b a b <unk>", "c b a"], "words", 6)
    assert (vocabulary.size, vocabulary.encode("b a c <unk> x")) == (6, [4, 5, UNK, UNK, UNK])
    assert vocabulary.decode([4, EOS, 5, UNK]) == "b a <unk>"
    assert vocabulary_of(vocabulary.to_text()).encode("a b") == [5, 4]
    assert SPECIAL[PAD] == "<pad>"


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_what_a_user_writes_is_no_control_token(kind):
    vocabulary = train_vocabulary([*TEXTS, "<s> </s> <pad> <unk>"], kind, 60)
    for word in ("<s>", "<pad>", "</s>"):
        assert not {BOS, PAD, EOS} & set(vocabulary.encode(f"the {word} dog"))
        assert vocabulary.encode_all([word]) == [vocabulary.encode(word)]
    if kind == "words":
        assert vocabulary.encode("<s> <pad> </s> <unk>") == [UNK] * 4


def test_pieces_are_learned_from_all_of_the_texts_however_many_there_are(monkeypatch):
    monkeypatch.setattr(vocabularies, "SENTENCES", 200)
    many = ["a man walks"] * 2000 + ["ein Hund"] * 2000
    vocabulary = train_vocabulary(iter(many), "bpe", 40)
    for text in (many[0], many[-1]):
        assert UNK not in vocabulary.encode(text)
    assert train_vocabulary(many, "bpe", 40).data == vocabulary.data
    drawn = vocabularies._drawn((str(number) for number in range(4000)), 400)
    assert len(set(drawn)) == 400
    assert all(20 < sum(int(text) // 400 == tenth for text in drawn) < 65 for tenth in range(10))
    assert vocabularies._drawn(["b", "a"], 2) == ["b", "a"]


def test_a_vocabulary_that_cannot_be_trained_is_a_sentence():
    for kind in ("unigram", "words"):
        with pytest.raises(RunFailed, match=r"text\.vocab_size|has no words"):
            train_vocabulary([], kind, 20)
    with pytest.raises(RunFailed, match=r"text\.vocab_size: cannot train a tokenizer of 8 tokens"):
        train_vocabulary(TEXTS, "bpe", 8)


@pytest.mark.parametrize(
    "text",
    ["", "words", "words:!", "words:" + base64.b64encode(b"x").decode(), "other:" + Vocabulary("other", b"a").to_text(),
     Vocabulary("words", b"\xff").to_text(), "words:" + base64.b64encode(zlib.compress(b"a b" * 99)[:-4]).decode()],
)  # fmt: skip
def test_a_damaged_vocabulary_is_refused(text):
    with pytest.raises(UserError, match="the tokenizer is damaged"):
        vocabulary_of(text)


def test_a_damaged_model_of_pieces_is_refused_and_tokens_out_of_range_are_no_text():
    with pytest.raises(UserError, match="the tokenizer is damaged"):
        vocabulary_of(Vocabulary("sentencepiece", b"nothing").to_text()).encode("a")
    with pytest.raises(ValueError, match="below 5"):
        Vocabulary("words", b"a").decode([5])
