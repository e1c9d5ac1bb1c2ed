"""Text: lines of files, vocabularies, pairs of sentences and windows of a stream as tokens."""
