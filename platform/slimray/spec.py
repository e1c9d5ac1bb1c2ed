"""Strict specs, safe YAML and one-sentence errors for everything a user writes.

`Spec` is the base class of every section of a job YAML: it is frozen, refuses unknown fields, and uses the string under
a field as its help text. `read_yaml` returns plain documents and refuses duplicate keys, alias bombs and oversized
files. `parse` turns a document into a Spec and every pydantic complaint into `file: field: what is wrong (got ...)`,
with a "did you mean" for unknown names. A user's mistake is always a `UserError`; the command line prints it without a
traceback and exits with code 2. `1e-3` is a number here, although it is text in YAML 1.1.
"""

import contextlib
import difflib
import importlib.util
import os
import re
import select
import stat
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from slimray.credentials import find, redact_text

MAX_YAML_BYTES = 1_000_000
MAX_YAML_ALIASES = 50
MAX_YAML_VALUES = 100_000
MAX_YAML_NUMBER = 100  # characters
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
SURROGATE = re.compile(r"[\ud800-\udfff]")
PIPE_PATIENCE_S = 10.0  # how long to wait for data when the file is a pipe
NO_CREDENTIALS = (
    "remove it, because it would be stored and shown. Storage uses the credentials of the environment (AWS_*, "
    "GOOGLE_APPLICATION_CREDENTIALS), the variables a cluster needs are named in `secrets`, and a file behind a signed "
    "link must be downloaded first"
)


def shown(text: Any) -> str:
    """Return `text` without credentials and with control characters and invalid Unicode escaped."""
    text = CONTROL.sub(lambda m: repr(m[0])[1:-1], redact_text(str(text)))
    return text.encode("utf-8", "backslashreplace").decode()


class UserError(Exception):
    """A mistake the user can fix: one sentence that names the file, the field and the next step. Exit code 2.

    The sentence is made safe for terminals, logs and run folders by `shown`.
    """

    def __init__(self, sentence: str = ""):
        super().__init__(shown(sentence))


class RunFailed(Exception):
    """A valid run that started but did not finish: one sentence. Exit code 1, or 3 if its retries are used up."""

    def __init__(self, sentence: str, code: int = 1):
        super().__init__(shown(sentence))
        self.code = code


def require_extra(extra: str, what: str, *modules: str) -> None:
    """Raise UserError if one of `modules`, which `pip install 'slimray[<extra>]'` brings, is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}, not installed here: pip install 'slimray[{extra}]'")


class Spec(BaseModel):
    """Base class of everything a user may write: frozen, strict about names, documented by attribute docstrings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


S = TypeVar("S", bound=Spec)
T = TypeVar("T")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the closest of `options`, or the sorted list when nothing is close."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(options) or 'none'})"


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`; raise UserError `unknown <what> 'name', did you mean ...` otherwise."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}{did_you_mean(name, table)}")
    return table[name]


def located(message: str, where: str) -> str:
    """Return `message` with `where` (the file and job) in front of each line that does not start with it already."""
    return "\n".join(line if line.startswith(where) else f"{where}: {line}" for line in message.splitlines())


@contextlib.contextmanager
def noting(problems: list[str], where: str) -> Iterator[None]:
    """Add the lines of a UserError raised inside the block to `problems`, so that the remaining checks still run."""
    try:
        yield
    except UserError as error:
        problems.extend(located(str(error), where).splitlines())


class _SafeLoader(yaml.SafeLoader):
    """SafeLoader that limits aliases and merges (expansion bombs) and refuses duplicate keys."""

    num_aliases = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            self.num_aliases += 1
            if self.num_aliases > MAX_YAML_ALIASES:
                self._refuse(f"more than {MAX_YAML_ALIASES} aliases", self.peek_event())
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor):
        node: Any = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                self._refuse(f"{key.value!r} is written twice", key)
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None)
        return node

    def construct_scalar(self, node):
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(str(node.value)) > MAX_YAML_NUMBER:
            self._refuse(f"a number of more than {MAX_YAML_NUMBER} characters", node)
        return super().construct_scalar(node)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # `!!int ''`, `!!bool maybe`
            self._refuse(
                f"{str(node.value)[:40]!r} is not a value of {node.tag.replace('tag:yaml.org,2002:', '!!')}", node
            )

    def flatten_mapping(self, node):
        super().flatten_mapping(node)
        if len(node.value) > MAX_YAML_VALUES:
            self._refuse(f"its merges make more than {MAX_YAML_VALUES} values", node)

    def _refuse(self, why: str, at: Any) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, why, at.start_mark)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes repeated values in full instead of as aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _reader_or_writer in (_SafeLoader, _Dumper):  # YAML 1.1 reads `1e-3` as text; a user means the number
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def dump_yaml(document: Mapping[str, Any]) -> str:
    """Return plain `document` as YAML, in the order of its fields; `parse_yaml` reads it back unchanged."""
    return yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_yaml(text: str, where: str) -> list[dict[str, Any]]:
    """Return the non-empty documents of YAML `text`, each a mapping; raise UserError with the line otherwise."""
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"{where}: larger than {MAX_YAML_BYTES} bytes, too large for a job or card")
    try:
        documents = [d for d in yaml.load_all(text, Loader=_SafeLoader) if d is not None]
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        tab = "'\\t'" in (error.problem or "")
        raise UserError(
            f"{where}:{line} {'a tab: indent YAML with spaces only' if tab else error.problem or 'not valid YAML'}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid YAML ({(str(error).splitlines() or [''])[0]})") from None
    for document in documents:
        if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
            raise UserError(f"{where}: each document must be a mapping of names to values")
        if _is_larger(document, MAX_YAML_VALUES):
            raise UserError(f"{where}: its aliases expand to more than {MAX_YAML_VALUES} values")
        if (half := _half_a_character(document)) is not None:
            raise UserError(f"{where}: {half} contains half a character (a surrogate): write the character itself")
    return documents


def _is_larger(value: Any, num_values: int) -> bool:
    """Return whether `value` holds more than `num_values` values, counting a shared one wherever it appears."""
    stack, room = [value], num_values
    while stack and room >= 0:
        item = stack.pop()
        room -= 1
        stack.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
    return room < 0


def _half_a_character(document: Mapping[str, Any]) -> str | None:
    """Return the first text of a document that contains a surrogate, escaped; None if there is none."""
    stack: list[Any] = [document]
    while stack:
        item = stack.pop()
        if isinstance(item, str) and SURROGATE.search(item):
            return ascii(item[:60])
        stack.extend([*item, *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else ())
    return None


def read_yaml(path: str | Path) -> list[dict[str, Any]]:
    """Return the documents of the YAML file at `path`; raise UserError if it is missing, unreadable or not YAML."""
    try:
        data = _read_some(path, MAX_YAML_BYTES + 1)
        text = data.decode("utf-8", "strict" if len(data) <= MAX_YAML_BYTES else "replace")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason[:1].lower()}{reason[1:]})") from None
    return parse_yaml(text, str(path))


def _read_some(path: str | Path, num_bytes: int) -> bytes:
    """Return the first `num_bytes` of a file or of a pipe such as `<(command)`, which must deliver within a limit."""
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file.read(num_bytes)
        parts: list[bytes] = []
        while sum(map(len, parts)) < num_bytes:
            if not select.select([file], [], [], PIPE_PATIENCE_S)[0]:
                raise OSError(f"it is a pipe that has delivered nothing for {PIPE_PATIENCE_S:g} s")
            chunk = file.read(num_bytes)
            if chunk == b"":
                break
            parts.append(chunk or b"")
        return b"".join(parts)


def parse(spec: type[S], document: Mapping[str, Any], where: str) -> S:
    """Return `spec` filled from `document`; raise one UserError with a line `where: field: reason` per problem.

    A credential in any of the texts is such a problem, because what a user writes is stored in run folders and shown.
    """
    held = [
        f"{where}: {field}: holds what looks like a secret ({what}): {NO_CREDENTIALS}" for field, what in find(document)
    ]
    if held:
        raise UserError("\n".join(held))
    try:
        return spec.model_validate(dict(document))
    except ValidationError as error:
        raise UserError("\n".join(_sentences(spec, error, where))) from None


def set_value(document: dict[str, Any], assignment: str) -> None:
    """Apply one `--set a.b=value` to a plain document in place; the value is YAML (`[1, 2]`, `true`, `1e-3`).

    Raises UserError if the assignment has no `=`, or if a name on its path is a value without fields.
    """
    path, equals, value = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {assignment}: must look like section.field=value")
    node = document
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise UserError(f"--set {assignment}: {key!r} is a value and has no fields")
        node = child
    try:
        parsed = yaml.load(value, Loader=_SafeLoader) if value.strip() else ""  # noqa: S506 a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError):
        parsed = value
    node[keys[-1]] = parsed


def _sentences(spec: type[BaseModel], error: ValidationError, where: str) -> list[str]:
    """Return `where: field: reason` for each invalid field; the members of a union share a line."""
    reasons: dict[str, list[str]] = {}
    shown: dict[str, str] = {}
    items = error.errors()
    for item in items:
        above = len(item["loc"])
        if item["type"] == "too_short" and any(
            o["loc"][:above] == item["loc"] and len(o["loc"]) > above for o in items
        ):
            continue  # pydantic counts only valid items; each invalid one already has a sentence of its own
        loc = [part for part in item["loc"] if not str(part).startswith("function-")]
        names, owners = _walk(spec, loc)
        field, reason = _reason(item, names, owners)
        reasons.setdefault(field, []).append(reason)
        got = repr(item.get("input"))
        if item["type"] in ("missing", "extra_forbidden", "value_error", "union_tag_invalid", "union_tag_not_found"):
            got = ""
        shown[field] = f" (got {got})" if got and len(got) < 80 and not isinstance(item.get("input"), dict) else ""
    return [
        f"{where}: {field + ': ' if field else ''}{' or '.join(said)}{shown[field]}" for field, said in reasons.items()
    ]


def _reason(item: Any, names: list[str], owners: list[Any]) -> tuple[str, str]:
    """Return the field and what is wrong with it; a validator of a whole section may name the field: `lr: reason`."""
    kind, field = item["type"], ".".join(names)
    if kind == "extra_forbidden":
        known = [
            field.alias or name for owner in owners if _is_spec(owner) for name, field in owner.model_fields.items()
        ]
        return field, "unknown field" + (did_you_mean(names[-1], known) if known else "")
    if kind == "missing":
        return field, "is required"
    if kind.startswith("union_tag"):
        discriminator = item["ctx"]["discriminator"].strip("'")
        field = ".".join([*names, discriminator])
        if kind == "union_tag_not_found":
            return field, "is required"
        known = [tag.strip(" '") for tag in item["ctx"]["expected_tags"].split(",")]
        return field, f"unknown {discriminator} {item['ctx']['tag']!r}{did_you_mean(item['ctx']['tag'], known)}"
    if kind in ("model_type", "model_attributes_type"):
        return field, "must be a section of fields"
    message = item["msg"].removeprefix("Value error, ")
    inner = re.match(r"([A-Za-z_][\w.]*): ", message)
    if kind == "value_error" and inner:
        return ".".join([*names, inner[1]]), message[inner.end() :]
    message = re.sub(r"^(Input|Value|Tuple|List|Set|Dictionary|String) should", "must", message)
    message = re.sub(r"a valid (tuple|list)\b", "a list", message).replace("a valid dictionary", "a mapping")
    for words, sign in (("greater than", ">"), ("less than", "<")):
        message = message.replace(f"{words} or equal to", f"{sign}=").replace(words, sign)
    return field, re.sub(r" after validation|, unable to parse string as an? \w+", "", message)


def _walk(spec: type[BaseModel], loc: list[Any]) -> tuple[list[str], list[Any]]:
    """Return the names the user wrote on the way to `loc`, and the types that contain the last of them.

    In a `loc`, pydantic inserts a tag of its own (a type, a discriminator's value) after every field that is a union.
    """
    names: list[str] = []
    kinds, owners = [spec], [spec]
    for part in loc:
        if len(kinds) > 1 and not isinstance(part, int):
            kinds = [kind for kind in kinds if _has_tag(kind, part)] or kinds
            kinds = kinds[:1]
            continue
        names.append(str(part))
        owners, inner = kinds, []
        for kind in kinds:
            if _is_spec(kind):
                fields = [field for name, field in kind.model_fields.items() if part in (name, field.alias)]
                inner += [member for field in fields for member in _members(field.annotation)]
            else:
                inner += [member for argument in get_args(kind)[-1:] for member in _members(argument)]
        kinds = inner
    return names, owners


def _members(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows, without None and `...`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    if origin is tuple:  # only the first item type of a tuple is used
        return [tuple[get_args(annotation)[:1]]]
    return [] if annotation in (type(None), ...) else [annotation]


def _has_tag(kind: Any, tag: str) -> bool:
    """Return whether pydantic's `tag` means this member of a union."""
    if not _is_spec(kind):
        return tag.startswith(getattr(get_origin(kind) or kind, "__name__", " "))
    return kind.__name__ == tag or any(tag in get_args(field.annotation) for field in kind.model_fields.values())


def _is_spec(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
