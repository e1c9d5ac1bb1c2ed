"""Pages of the dashboard on run folders that are truncated, hold content that slimray did not write, or are malicious.

No folder may cause an exception, and pages must consist of text and their own links: no component, markup or address
comes from a file.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.runs_to_show import searched, shrunk, trained, write_rows
from tests.waits import patience

from slimray.report.dashboard import app, views
from slimray.report.dashboard.watch import Watch

NAME = "<img src=x onerror=alert(1)>"
SCRIPT = "</script><script>alert(1)</script>"
EVIL = {"type": "Location", "namespace": "dash_core_components", "props": {"id": "url", "href": "http://evil.example/"}}
VALUES = st.sampled_from(
    [None, True, 0, -1, 10**30, 10**400, -(10**400), 1e308, -1e308, 5e-324, float("nan"), float("inf"), "", "1", SCRIPT,
     "\ud800", "javascript:alert(1)", "9" * 5000, [], [[]], [SCRIPT], {}, {SCRIPT: SCRIPT}, EVIL, [EVIL],
     {"a": {"b": [1, None]}}]
)  # fmt: skip
WHOLE = {"nothing": b"", "a brace": b"{", "null": b"null", "a list": b"[1]", "no text": b"\xff\xfe\x00", "NaN": b"NaN",
         "deep lists": b"[" * 3000, "deep objects": b'{"a":' * 3000}  # fmt: skip
SPOTS = st.integers(0, 10_000)
DAMAGES = st.one_of(
    st.tuples(st.just("set"), SPOTS, SPOTS, VALUES),
    st.tuples(st.just("flood"), SPOTS, SPOTS, VALUES),
    st.tuples(st.just("rename"), SPOTS, SPOTS, st.sampled_from([SCRIPT, "", "\ud800", "val/" + SCRIPT, "9" * 5000])),
    st.tuples(st.just("cut"), SPOTS, SPOTS, st.none()),
    st.tuples(st.just("write"), SPOTS, SPOTS, st.sampled_from(sorted(WHOLE))),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Write a run of each kind that has pages of its own."""
    where = tmp_path_factory.mktemp("made")
    write_rows(trained(str(where), "trained"), [{"path": "a.mp4", "split": "train", "reason": "cut"}], "quarantine")
    searched(str(where), "searched", 12)
    searched(str(where), "searching", 6, finished=False)
    shrunk(str(where), "shrunk")
    return where


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Return (container, key) of everything inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from nodes(inner)


def damage(folder: Path, how: str, which: int, spot: int, value: Any) -> None:
    """Damage a file of the run folder: one value, all values of a name, a name, the end, or all of it.

    A file is as likely as all files of a subfolder together.
    """
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".jsonl", ".yaml") and path.stat().st_size:
            groups.setdefault(path.relative_to(folder).parts[0], []).append(path)
    group = list(groups.values())[which % len(groups)]
    path = group[spot % len(group)]
    data = path.read_bytes()
    if how in ("cut", "write"):
        path.write_bytes(data[: spot % len(data)] if how == "cut" else WHOLE[value])
        return
    text = data.decode("utf-8", "replace")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    try:
        there = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return  # already damaged, or a job, which is YAML and damaged as bytes
    found = list(nodes(there))
    container, key = found[spot % len(found)]
    if how == "rename" and isinstance(container, dict):
        container[value] = container.pop(key)
    for other, name in found if how == "flood" else [(container, key)] if how == "set" else []:
        if name == key and type(other) is type(container):
            other[name] = value
    path.write_text("\n".join(map(json.dumps, there)))


def shown(tree: list[Any]) -> Any:
    """Return the page as a browser gets it; ValueError if that is not JSON."""
    from plotly.io.json import to_json_plotly

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(to_json_plotly(app.named(app.as_text(tree), "page")) or "", parse_constant=refuse)


HTML = {"A", "Dd", "Div", "Dl", "Dt", "Figcaption", "Figure", "H1", "H2", "H3", "I", "Iframe", "Li", "Nav", "P", "Pre",
        "Section", "Span", "Table", "Tbody", "Td", "Th", "Thead", "Tr", "Ul"}  # fmt: skip
OWN_MARKUP = re.compile(r"<(?!br>|/?extra>)")  # of hover texts


def check_component(value: Any) -> None:
    """Check that children are text, or our components with our addresses, and that figures hold no foreign markup."""
    if isinstance(value, list):
        for one in value:
            check_component(one)
    if not isinstance(value, dict):
        return
    props = value["props"]
    if value["namespace"] == "dash_core_components":
        assert value["type"] in ("Link", "Graph")
    else:
        assert value["namespace"] == "dash_html_components"
        assert value["type"] in HTML
    assert not any("danger" in name for name in props)
    for name in ("href", "src"):
        assert re.match(r"/(?!/)", props.get(name, "/")), props[name]
    if value["type"] == "Iframe":
        assert props["sandbox"] == "allow-scripts"
    for text in strings({"figure": props.get("figure")}):
        assert not OWN_MARKUP.search(text), text
    check_component(props.get("children"))


def strings(value: Any) -> Iterator[str]:
    """Return all texts of a figure that Plotly draws."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            if name != "uirevision":  # compared, never drawn
                yield from strings(one)


@settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(
    kind=st.sampled_from(["trained", "searched", "searching", "shrunk"]),
    damages=st.lists(DAMAGES, min_size=1, max_size=6),
    query=st.dictionaries(
        st.sampled_from(["view", "sort", "state", "trial", "trials", "compare", "runs"]),
        st.sampled_from(["report", "job", "result", "damaged", "half", "tenth", "small 0", SCRIPT, "a,b"]),
    ),
    words=st.sampled_from(["", "train", SCRIPT]),
)
def test_no_folder_ends_in_an_exception_or_in_anything_but_text(made, tmp_path, kind, damages, query, words):
    where = tmp_path / "runs"
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(made / kind, where / NAME)
    shutil.copytree(made / "trained", where / "whole")
    for one in damages:
        damage(where / NAME, *one)
    watch = Watch(str(where))
    try:
        rows = watch.rows(patience(30))
        assert {row["name"] for row in rows} == {NAME, "whole"}
        look, whole = (watch.look(name, patience(30)) for name in (NAME, "whole"))
        assert look is not None
        assert whole is not None
        pages = [
            views.runs_page(rows, query, words, str(where)),
            views.run_page(look, query),
            views.run_page(look, {**query, "view": "job"}),
            views.run_page(look, {**query, "view": ""}),
            views.compare_page([look, whole], [SCRIPT]),
        ]
        for page in pages:
            check_component(shown(page))
    finally:
        watch.close()
