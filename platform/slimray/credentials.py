"""Finds credentials in what a user writes, and replaces them by `***` in everything that leaves the process.

In: names, texts and plain values. `find` locates the credentials in a value, so that all inputs (jobs, cards, cluster
files, storage URIs) refuse them in the same way; `redact` is the one redactor of all outputs (files of a run, logs,
messages, trackers, webhooks, manifests). A credential is recognized by the name of its field, by its place in a URL, or
by its form. Surprising: file paths and names of environment variables (`token_env`, `..._FILE`) are not credentials,
and values of this process's own secret environment variables are replaced wherever they appear in a text.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
MIN_ENV_VALUE = 12  # characters; shorter values of secret environment variables are not searched for in texts

# A name that contains one of these, its words joined, names a credential.
STEMS = (
    "passw", "passphrase", "pgpass", "secret", "credential", "apikey", "accesskey", "privatekey", "accountkey",
    "sharedkey", "storagekey", "signingkey", "encryptionkey", "authkey", "sshkey", "webhook", "bearer",
    "connectionstring",
)  # fmt: skip
WORDS = ("pwd", "pass", "jwt", "sas", "authorization", "dsn", "cookie")  # as the last word of a name
NOT_VALUES = ("file", "path", "env", "dir", "folder", "name")  # last words of names that say where a credential is kept
VOCABULARY = ("pad", "unk", "eos", "bos", "sep", "cls", "mask", "start", "end", "begin", "special", "image", "prompt",
              "num", "max", "min", "per", "class", "first", "last", "next")  # fmt: skip
PARAMETERS = ("key", "sig", "signature", "auth", "keypairid", "googleaccessid")  # of a URL, besides secret names

_EDGE = r"(?<![A-Za-z0-9_+/=-])"
FORMS = re.compile(
    "|".join(
        (
            r"-----BEGIN [A-Z ]*PRIVATE KEY[A-Z -]*"
            r"[^\"'<>]*?(?:-----END [A-Z ]*PRIVATE KEY[A-Z ]*-----|\Z|(?=[\"'<>]))",
            _EDGE + r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9+/=])",  # AWS
            r"\bgh[pousr]_[A-Za-z0-9]{20,}",  # GitHub
            r"\bgithub_pat_\w{20,}",
            r"\bgl(?:pat|dt|rt|cbt|ptt|ft|soat|oas|agent|imt|ffct)-[\w-]{16,}",  # GitLab
            r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",  # Hugging Face
            r"\bwandb_v\d+_\w{16,}",
            _EDGE + r"(?:sk|rk)-(?=[\w-]*\d)[\w-]{20,}",  # OpenAI, Anthropic
            r"\b(?:sk|rk|whsec)_(?:live_|test_)?[A-Za-z0-9]{20,}",  # Stripe
            r"\bxox[a-z]-[\w-]{10,}|\bxapp-[\w-]{10,}",  # Slack
            r"\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{20,}",  # Google
            r"\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?",  # JSON web tokens
            r"\b(?:npm_|dckr_pat_|dop_v1_|shpat_|pypi-AgE|dapi|nvapi-|r8_|pul-|sntrys_|lin_api_|PMAK-)[\w-]{20,}",
            r"\bSG\.[\w-]{16,}\.[\w-]{16,}",
            r"(?<!\d)\d{8,10}:[A-Za-z0-9_-]{35}\b",  # Telegram
            r"https?://hooks\.slack(?:-gov)?\.com/[^\s\"'<>]+",
            r"https?://(?:\w+\.)?discord(?:app)?\.com/api/(?:v\d+/)?webhooks/[^\s\"'<>]+",
            r"https?://[\w.-]*(?:webhook\.office\.com|outlook\.office\.com/webhook|hooks\.zapier\.com|logic\.azure\.com)/[^\s\"'<>]+",
            r"https?://api\.telegram\.org/bot[^\s\"'<>]+",
        )
    )
)
USER = re.compile(r"(?P<head>[A-Za-z][\w+.-]*://)(?P<user>[^/\s@\"'<>?#]+@|[^/\s@:\"'<>]*:[^\s@\"'<>]*@)")
PARAMETER = re.compile(r"[?&;#](?P<name>[\w.%~\[\]-]{1,80})=")
PARAMETER_VALUE = re.compile(r"[^&;#\s\"'<>\\]+")
# `name=value` and `"name": "value"` anywhere in a text; `name: value` only where the value has a digit, unlike prose.
ASSIGNED = re.compile(
    r"(?<![\w?&;%])(?P<name>[A-Za-z_][\w.-]{1,80})(?:=|\\?[\"']\s*[:=]\s*|:[ \t]+(?=[\"']?[^\s\"']*\d))\\?[\"']?"
)
ASSIGNED_VALUE = re.compile(r"[^\s\"'<>,;&\\]{4,}")
SPOKEN = re.compile(
    r"(?i)(?P<head>\b(?:bearer|wandb login|authorization:\s*(?:basic|token|bearer))\s+)(?P<value>[\w.~+/=-]{16,})"
)
# A quick first search: a text that does not match contains no credential.
HINT = re.compile(
    r"[=@]|(?i:passw|passphrase|pgpass|secret|token|key|cred|bearer|pwd|webhook|login|authori|cookie|connection|dsn|jwt)"
    r"|AKIA|ASIA|ABIA|ACCA|_pat_|hf_|api_org_|wandb_v|gh[pousr]_|gl[a-z]{2,5}-|[sr]k[-_]|whsec_|xox|xapp-|AIza|ya29|GOCSPX"
    r"|eyJ|npm_|dop_v1_|pypi-|dapi|nvapi-|r8_|pul-|sntrys_|lin_api|PMAK-|SG\.|hooks\.|azure|telegram|\d{8}:[A-Za-z0-9_-]{35}"
    r"|[A-Za-z0-9/+]{40}"
)
AWS_SECRET = re.compile(r"(?<![A-Za-z0-9/+=])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])")


def is_secret_name(name: str) -> bool:
    """Return whether a field, variable or parameter of this name holds a credential (not the place of one)."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    words = [word for word in words if not word.isdigit()]
    if not words or words[-1] in NOT_VALUES or words in (["secrets"], ["pwd"]):  # $PWD is a folder
        return False
    joined = "".join(words)
    if joined.endswith(("file", "path")):
        return False
    if any(stem in joined for stem in STEMS) or words[-1] in WORDS:
        return True
    if "token" in words:
        place = words.index("token")
        return not (place and words[place - 1] in VOCABULARY) and (place == len(words) - 1 or name.isupper())
    return joined.endswith("token") or (name.isupper() and "key" in words)


def redact(value: Any, names: bool = True) -> Any:
    """Return `value` with every credential replaced by `***`, in dicts, lists and texts at any depth.

    With `names=False` only texts are examined, not the names of their fields.
    """
    if isinstance(value, Mapping):
        return {
            redact(key, names): HIDDEN if names and _is_hidden(key, one) else redact(one, names)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(redact(one, names) for one in value) if type(value) in (list, tuple) else list(value)
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Return `text` with every credential in it replaced by `***`."""
    for name, value in os.environ.items():
        if len(value) >= MIN_ENV_VALUE and value in text and is_secret_name(name) and not os.path.exists(value):
            text = text.replace(value, HIDDEN)
    if not HINT.search(text):
        return text
    text = FORMS.sub(HIDDEN, text)
    text = USER.sub(lambda m: m[0] if _is_port(m) else f"{m['head']}{HIDDEN}@", text)
    text = _without(text, [span for span, _ in _parameters(text)])
    text = SPOKEN.sub(lambda m: f"{m['head']}{HIDDEN}", text)
    text = _without(text, list(_assigned(text)))
    return AWS_SECRET.sub(lambda m: HIDDEN if _is_random(m[0]) else m[0], text)


def find(value: Any, names: bool = False, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield (field, kind of credential) for every credential in a plain value; neither contains the credential itself.

    With `names`, a text also counts as a credential because of the name of its field, as for environment variables.
    """
    if isinstance(value, Mapping):
        for key, one in value.items():
            inner = f"{field}.{key}" if field else str(key)
            if names and _is_hidden(key, one):
                yield redact_text(inner), "a credential, by its name"
            else:
                yield from find(one, names, inner)
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from find(one, names, f"{field}.{number}" if field else str(number))
    elif isinstance(value, str) and (what := held(value)):
        yield redact_text(field), what


def held(text: str) -> str | None:
    """Return the kind of credential a text contains, in words without its value; None if it contains none."""
    if not HINT.search(text):
        return None
    if FORMS.search(text):
        return "a key, a token or the address of a webhook"
    if any(not _is_port(m) for m in USER.finditer(text)):
        return "a user or password inside a URL"
    for _, name in _parameters(text):
        return f"a credential as the parameter {name!r} of a URL"
    if SPOKEN.search(text) or any(True for _ in _assigned(text)):
        return "a password or token"
    if any(_is_random(m[0]) for m in AWS_SECRET.finditer(text)):
        return "what looks like a secret access key"
    return None


def _is_hidden(name: Any, value: Any) -> bool:
    """Return whether a field is a credential by its name; texts that are empty, a path or already hidden are not."""
    return isinstance(value, str) and value not in ("", HIDDEN) and is_secret_name(str(name)) and not _is_path(value)


def _is_path(value: str) -> bool:
    return bool(re.fullmatch(r"(?:~|\.{0,2})/(?:[\w .@-]+/)*[\w .@-]+\.\w{1,8}|\$\{?\w+\}?", value))


def _is_secret_parameter(name: str) -> bool:
    plain = unquote(name)
    joined = re.sub(r"[^a-z]", "", plain.lower())
    return joined in PARAMETERS or is_secret_name(plain) or joined.endswith(("signature", "credential", "token"))


def _is_port(match: re.Match[str]) -> bool:
    """Return whether the text before an @ is not a user (`http://host:8080/path@x`), or is already hidden."""
    user = match["user"]
    is_port = match["head"].startswith(("http", "ws")) and re.match(r"[^/:@]+:\d+/", user)
    return bool(is_port) or user == f"{HIDDEN}@"


def _parameters(text: str) -> Iterator[tuple[tuple[int, int], str]]:
    """Yield the span of the value of each secret parameter of a URL in a text, and the parameter's name."""
    for head in PARAMETER.finditer(text):
        value = PARAMETER_VALUE.match(text, head.end())
        if value and value[0] != HIDDEN and _is_secret_parameter(head["name"]):
            yield value.span(), unquote(head["name"])


def _assigned(text: str) -> Iterator[tuple[int, int]]:
    """Yield the span of each value in a text that is assigned to the name of a credential."""
    for head in ASSIGNED.finditer(text):
        name, value = head["name"].rpartition(".")[2], ASSIGNED_VALUE.match(text, head.end())
        if value is None or value[0][0] in "*$({[" or not is_secret_name(name) or _is_path(value[0]):
            continue
        if not re.fullmatch(r"[-+.\deE]+", value[0]) or "pass" in name.lower():  # `token=128` is a number
            yield value.span()


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    """Return `text` with each span replaced by `***`."""
    for begin, end in reversed(spans):
        text = text[:begin] + HIDDEN + text[end:]
    return text


def _is_random(text: str) -> bool:
    """Return whether 40 characters of base64 look random, as AWS secrets do, unlike the words of a path or hex."""
    kinds = ["aA0/"[c.isupper() + 2 * c.isdigit() + 3 * (c in "/+")] for c in text]
    changes = sum(one != other for one, other in itertools.pairwise(kinds))
    in_words = sum(len(word) for word in re.findall(r"[a-z]{5,}", text))
    return {"a", "A", "0"} <= set(kinds) and changes >= 12 and in_words < 10 and len(set(text)) >= 18
