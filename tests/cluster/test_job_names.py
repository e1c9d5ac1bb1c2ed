"""A job is identified by its id or its name; a name of jobs in several storages is refused as ambiguous."""

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from slimray.cluster import jobs_api, specs
from slimray.spec import UserError, parse


def listed(submission_id: str, start: int, storage: str | None) -> dict[str, Any]:
    """Return a job as listed by Ray's dashboard."""
    metadata = {} if storage is None else {"storage": storage}
    return {"submission_id": submission_id, "status": "RUNNING", "start_time": start, "metadata": metadata}


LISTED = [
    listed("exp-1", 1, "/runs/a"),
    listed("exp-2", 5, "/runs/a"),
    listed("exp-3", 3, "/runs/b"),
    listed("alone-1", 2, "/runs/a"),
    listed("alone-2", 4, "/runs/a"),
    listed("alone-10", 6, "/runs/a"),
    listed("alone-more-1", 7, "/runs/b"),
    {"submission_id": None, "job_id": "01", "start_time": 0},  # the driver of another user
]


class Dashboard(http.server.BaseHTTPRequestHandler):
    """The list of jobs of a head, as its dashboard returns it."""

    def do_GET(self) -> None:
        data = json.dumps(LISTED).encode()
        self.send_response(200 if self.path == "/api/jobs/" else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def target(monkeypatch) -> Iterator[specs.Target]:
    """A cluster whose head lists LISTED."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = parse(
        specs.JobsCluster, {"kind": "jobs", "address": f"http://127.0.0.1:{server.server_port}"}, "mine.yaml"
    )
    yield specs.Target("mine", "mine.yaml", cluster)
    server.shutdown()
    server.server_close()


def test_a_name_means_its_newest_attempt(target):
    assert jobs_api.job_info("alone", target)["submission_id"] == "alone-10"
    assert jobs_api.job_info("alone-2", target)["submission_id"] == "alone-2"
    assert jobs_api.job_info("alone-more", target)["submission_id"] == "alone-more-1"


def test_a_name_of_jobs_in_several_storages_is_a_question_with_the_ids(target):
    with pytest.raises(UserError) as caught:
        jobs_api.job_info("exp", target)
    assert str(caught.value) == (
        "mine.yaml: 'exp' is the name of several jobs, give the id of one: "
        "exp-2 (runs are in /runs/a), exp-3 (runs are in /runs/b)"
    )
    assert jobs_api.job_info("exp-3", target)["metadata"]["storage"] == "/runs/b"


def test_a_name_that_no_job_has_is_one_sentence_with_what_is_like_it(target):
    with pytest.raises(UserError, match=r"mine.yaml: unknown job 'alnoe-1', did you mean 'alone-1'"):
        jobs_api.job_info("alnoe-1", target)
