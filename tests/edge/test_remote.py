"""A device that runs `slimray agent`, from the client's side."""

from slimray.edge.remote import Remote


def test_the_token_of_an_agent_is_in_no_representation():
    remote = Remote("http://127.0.0.1:8060", "S3CRET", {"device": "a board"})
    for text in (repr(remote), str(remote), f"{[remote]}"):
        assert "S3CRET" not in text
        assert "a board" in text
