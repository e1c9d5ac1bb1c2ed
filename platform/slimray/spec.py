"""How slimray reads what a user wrote: strict specs, safe YAML, errors of one sentence.

`Spec` is the base of every section of a job YAML: frozen, unknown fields refused, the string under a field is its help.
`read_yaml` returns plain documents and refuses duplicate keys, alias bombs and oversized files. `parse` turns a document
into a Spec and every pydantic complaint into `file: field: what is wrong (got ...)` with a "did you mean" for unknown names.
A user's mistake is always a `UserError`; the command line prints it and exits with 2, without a traceback.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

MAX_YAML_BYTES = 1_000_000
MAX_YAML_ALIASES = 50


class UserError(Exception):
    """Something the user can mend: one sentence that names file, field and next step. Exit code 2."""


class RunFailed(Exception):
    """A run that was right to start and did not finish: one sentence. Exit code 1."""


class Spec(BaseModel):
    """Base of all that a user may write: frozen, strict about names, documented by attribute docstrings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


S = TypeVar("S", bound=Spec)
T = TypeVar("T")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the closest of `options`, or the sorted list when nothing is close."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(options)})"


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`; raise UserError `unknown <what> 'name', did you mean ...` otherwise."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}{did_you_mean(name, table)}")
    return table[name]


class _SafeLoader(yaml.SafeLoader):
    """SafeLoader that caps aliases (expansion bombs) and refuses a key written twice."""

    num_aliases = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            self.num_aliases += 1
            if self.num_aliases > MAX_YAML_ALIASES:
                raise yaml.constructor.ConstructorError(
                    None, None, f"more than {MAX_YAML_ALIASES} aliases", self.peek_event().start_mark
                )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key != "<<" and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is written twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> list[dict[str, Any]]:
    """Return the documents of YAML `text` (each a mapping, empty ones left out); UserError with the line otherwise."""
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"{where}: larger than {MAX_YAML_BYTES} bytes, which is no job or card")
    try:
        documents = [d for d in yaml.load_all(text, Loader=_SafeLoader) if d is not None]
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise UserError(f"{where}:{line} {error.problem or 'not valid YAML'}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid YAML ({str(error).splitlines()[0]})") from None
    for document in documents:
        if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
            raise UserError(f"{where}: each document must be a mapping of names to values")
    return documents


def read_yaml(path: str | Path) -> list[dict[str, Any]]:
    """Return the documents of the YAML file at `path`; UserError if it is missing, unreadable or not YAML."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return parse_yaml(text, str(path))


def parse(spec: type[S], document: Mapping[str, Any], where: str) -> S:
    """Return `spec` filled from `document`; all complaints in one UserError, a line each, `where: field: reason`."""
    try:
        return spec.model_validate(dict(document))
    except ValidationError as error:
        raise UserError("\n".join(_sentence(spec, item, where) for item in error.errors())) from None


def set_value(document: dict[str, Any], assignment: str) -> None:
    """Apply one `--set a.b=value` to a plain document in place; the value is read as YAML (`[1, 2]`, `true`, `1e-3`)."""
    path, equals, value = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {assignment}: must look like section.field=value")
    node = document
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {assignment}: {key!r} is a value, it has no fields")
        node = child
    try:
        parsed = yaml.load(value, Loader=_SafeLoader) if value.strip() else ""
    except yaml.YAMLError:
        parsed = value
    node[keys[-1]] = _number(parsed)


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text; a user means the number."""
    if isinstance(value, str):
        try:
            return float(value) if value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def _sentence(spec: type[BaseModel], item: Any, where: str) -> str:
    loc = [part for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    field = ".".join(str(part) for part in loc) or "document"
    got = item.get("input")
    if item["type"] == "extra_forbidden":
        owner = _owner(spec, loc[:-1])
        hint = did_you_mean(str(loc[-1]), owner.model_fields) if owner else ""
        return f"{where}: {field}: unknown field{hint}"
    if item["type"] == "missing":
        return f"{where}: {field}: is required"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message.replace("should be", "must be").replace("greater than or equal to", ">=")
    message = message.replace("less than or equal to", "<=").replace("greater than", ">").replace("less than", "<")
    shown = repr(got)
    return f"{where}: {field}: {message}" + (f" (got {shown})" if len(shown) < 80 and not isinstance(got, dict) else "")


def _owner(spec: type[BaseModel], loc: list[Any]) -> type[BaseModel] | None:
    """The Spec class that holds the field at `loc`, for "did you mean"; None inside unions and lists."""
    owner: type[BaseModel] = spec
    for part in loc:
        field = owner.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return None
        owner = inner[0]
    return owner
