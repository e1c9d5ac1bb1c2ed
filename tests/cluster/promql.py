"""A small evaluator of the PromQL that our alerts and panels use, over series that are functions of time."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCRAPE_S = 10
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[A-Za-z_]\w*|\d[\d.]*(?:e\d+|[smhd])?|=~|!=|==|>=|<=|[-+*/<>=(){}\[\],:])')
OPERATORS: dict[str, Callable[[float, float], Any]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b,
    "==": lambda a, b: a == b, ">": lambda a, b: a > b, "<": lambda a, b: a < b,
}  # fmt: skip
AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "sum": sum, "max": max, "min": min, "avg": lambda values: sum(values) / len(values),
}  # fmt: skip
OF_RANGES: dict[str, Callable[[list[float], float], float]] = {
    "changes": lambda values, _: sum(a != b for a, b in itertools.pairwise(values)),
    "resets": lambda values, _: sum(b < a for a, b in itertools.pairwise(values)),
    "rate": lambda values, range_s: (values[-1] - values[0]) / range_s,
}
Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, Any]  # numbers, or lists of numbers for a range
Node = Callable[[float], Vector | float]  # of the time in seconds


@dataclass(frozen=True)
class Series:
    """A metric with its labels; `value` is a function of time, None while it is not exported."""

    name: str
    labels: dict[str, str]
    value: Callable[[float], float | None]


def evaluate(expression: str, series: list[Series], time_s: float) -> dict[Labels, float]:
    """Return Prometheus' answer at `time_s`, by labels; ValueError for unsupported expressions."""
    parser = Parser(expression, series)
    node = parser.chain(0)
    if parser.tokens:
        raise ValueError(f"{expression}: not understood from {parser.tokens[0]!r} on")
    found = node(time_s)
    assert isinstance(found, dict)
    return found


class Parser:
    """Recursive-descent parser; each method returns the node that it has read."""

    LEVELS = (("and",), ("==", ">", "<"), ("+", "-"), ("*", "/"))

    def __init__(self, expression: str, series: list[Series]):
        self.tokens, self.series = TOKEN.findall(expression), series
        if TOKEN.sub("", expression).strip():
            raise ValueError(f"{expression}: holds characters that are not known here")

    def take(self, *expected: str) -> str:
        token = self.tokens.pop(0) if self.tokens else ""
        if expected and token not in expected:
            raise ValueError(f"{expected} expected, got {token!r}")
        return token

    def seconds(self) -> float:
        text = self.take()
        return float(text[:-1]) * UNITS[text[-1]]

    def chain(self, level: int) -> Node:
        if level == len(self.LEVELS):
            return self.postfix(self.atom())
        node = self.chain(level + 1)
        while self.tokens and self.tokens[0] in self.LEVELS[level]:
            operator = self.take()
            node = _both(operator, node, self.chain(level + 1))
        return node

    def names(self) -> list[str]:
        self.take("(")
        found = []
        while (token := self.take()) != ")":
            found += [token] if token != "," else []
        return found

    def atom(self) -> Node:
        token = self.take()
        if token == "(":
            node = self.chain(0)
            self.take(")")
            return node
        if token[0].isdigit():
            return lambda time_s: float(token)
        if token in AGGREGATES:
            by = []
            if self.tokens[0] == "by":
                self.take()
                by = self.names()
            self.take("(")
            node = self.chain(0)
            self.take(")")
            return lambda time_s: _aggregate(AGGREGATES[token], by, node(time_s))
        if token in OF_RANGES:
            self.take("(")
            node, range_s = self.chain(0), self.range_s
            self.take(")")
            return lambda time_s: {
                labels: OF_RANGES[token](values, range_s) for labels, values in _vector(node(time_s)).items()
            }
        return self.selector(token)

    def selector(self, name: str) -> Node:
        matchers = []
        if self.tokens and self.tokens[0] == "{":
            self.take()
            while (label := self.take()) != "}":
                if label != ",":
                    matchers.append((label, self.take("=", "=~", "!="), self.take()[1:-1].replace("\\", "")))
        chosen = [one for one in self.series if one.name == name and all(_fits(one.labels, *m) for m in matchers)]

        def node(time_s: float) -> Vector:
            found = {frozenset(one.labels.items()): one.value(time_s) for one in chosen}
            return {labels: value for labels, value in found.items() if value is not None}

        return node

    def postfix(self, node: Node) -> Node:
        while self.tokens and self.tokens[0] in ("[", "offset"):
            if self.take() == "offset":
                node = _shifted(node, self.seconds())
                continue
            self.range_s, step_s = self.seconds(), SCRAPE_S
            if self.take("]", ":") == ":":
                step_s = self.seconds()
                self.take("]")
            node = _range(node, self.range_s, step_s)
        return node


def _vector(found: Vector | float) -> Vector:
    assert isinstance(found, dict)
    return found


def _fits(labels: dict[str, str], name: str, operator: str, text: str) -> bool:
    value = labels.get(name, "")
    return bool(re.fullmatch(text, value)) if operator == "=~" else (value == text) is (operator == "=")


def _shifted(node: Node, offset_s: float) -> Node:
    return lambda time_s: node(time_s - offset_s)


def _range(node: Node, range_s: float, step_s: float) -> Node:
    def collect(time_s: float) -> Vector:
        found: Vector = {}
        for k in range(int(range_s // step_s) - 1, -1, -1):
            for labels, value in _vector(node(time_s - k * step_s)).items():
                found.setdefault(labels, []).append(value)
        return found

    return collect


def _aggregate(how: Callable[[list[float]], float], by: list[str], found: Vector | float) -> Vector:
    groups: dict[Labels, list[float]] = {}
    for labels, value in _vector(found).items():
        groups.setdefault(frozenset(pair for pair in labels if pair[0] in by), []).append(value)
    return {labels: how(values) for labels, values in groups.items()}


def _both(operator: str, left: Node, right: Node) -> Node:
    """Apply an operator to two vectors with equal labels, or to a vector and a number; comparisons are filters."""

    def node(time_s: float) -> Vector:
        a, b = _vector(left(time_s)), right(time_s)
        pairs = {labels: b.get(labels) if isinstance(b, dict) else b for labels in a}
        pairs = {labels: value for labels, value in pairs.items() if value is not None}
        if operator == "and":
            return {labels: a[labels] for labels in pairs}
        results = {labels: OPERATORS[operator](a[labels], value) for labels, value in pairs.items()}
        if operator in ("==", ">", "<"):
            return {labels: a[labels] for labels, holds in results.items() if holds}
        return results

    return node
