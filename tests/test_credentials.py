"""Credentials are found and replaced wherever they occur; text that only resembles one is left alone."""

import json
import random
import string

import pytest

from slimray.credentials import HIDDEN, find, held, is_secret_name, redact, redact_text

AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefgh"
HELD = {  # text -> the part that must not be seen
    "s3://AKIAIOSFODNN7EXAMPLE:" + AWS_SECRET + "@bucket/x": AWS_SECRET,
    "https://me:hunter2@host/x": "hunter2",
    "https://hunter2@host/x": "hunter2",
    "postgres://u:hunter2@h:5432/db": "hunter2",
    "mongodb+srv://u:hunter2%40@h/x": "hunter2",
    "redis://:hunter2@h:6379/0": "hunter2",
    "https://host/w.pth?token=hunter2": "hunter2",
    "https://host/w.pth?a=1&%74oken=hunter2": "hunter2",
    "https://host/w#access_token=hunter2": "hunter2",
    "s3://b/x?X-Amz-Signature=hunter2&v=1": "hunter2",
    "s3://b/x?X-Amz-Credential=hunter2": "hunter2",
    "s3://b/x?X-Amz-Security-Token=hunter2": "hunter2",
    "gs://b/x?X-Goog-Signature=hunter2": "hunter2",
    "s3://b/x?secret_key=hunter2": "hunter2",
    "https://x.blob.core.windows.net/c/f?sv=2020&se=2030&sig=hunter2%3D": "hunter2",
    "https://api.host/v1?key=hunter2": "hunter2",
    AWS_SECRET: AWS_SECRET,
    "AKIAIOSFODNN7EXAMPLE": "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE": "ASIAIOSFODNN7EXAMPLE",
    "hf_" + "aB" * 17: "aBaB",
    "ghp_" + "aB" * 18: "aBaB",
    "github_pat_" + "aB" * 11 + "_" + "aB" * 29: "aBaB",
    "glpat-" + "aB" * 10: "aBaB",
    "wandb_v1_" + "aB" * 20: "aBaB",
    "sk-proj-" + "aB1" * 16: "aB1aB1",
    "xoxb-1234567890-abcdef": "abcdef",
    "AIza" + "aB1" * 12: "aB1aB1",
    JWT: "abcdefgh",
    "https://hooks.slack.com/services/T0/B0/hunter2": "hunter2",
    "https://discord.com/api/webhooks/1/hunter2": "hunter2",
    "Authorization: Bearer hunter2hunter2hunter2": "hunter2",
    "PGPASS=hunter2": "hunter2",
    "docker run -e WANDB_API_KEY=hunter2 x": "hunter2",
    "train --password=hunter2": "hunter2",
    "password: hunter2": "hunter2",
    "https://host/go?url=https://other?token=hunter2": "hunter2",
    "env: NOTE=PGPASS=hunter2": "hunter2",
    '{"client_secret": "hunter2"}': "hunter2",
    "AccountName=x;AccountKey=hunter2/abc==;EndpointSuffix=y": "hunter2",
    "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----": "hunter2",
    '{"private_key": "-----BEGIN PRIVATE KEY-----\\nhunter2\\n-----END PRIVATE KEY-----\\n"}': "hunter2",
}
HARMLESS = [
    "s3://bucket/a@b/c",
    "s3://b/x?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1&anonymous=true",
    "http://host:8080/package@1.0",
    "https://host/w.pth?download=true",
    "0123456789abcdef0123456789abcdef01234567",  # a commit
    "sha256 " + "0123456789abcdef" * 4,
    "/data/Kinetics400/Train/Videos2019AbcDef",
    "/mnt/DatasetsOfTheTeam/SomethingV2/Train",
    "base_model.layer4.0.conv1.weight",
    "api_key: must be set",
    "optim.lr: must be > 0 (got 0)",
    "num_tokens=128 pad_token=[PAD] token_env=HF_TOKEN token_dim: 64 key=value",
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or",
    "PASSWORD=$PASSWORD",
    "tokens: 1234",
    "someone@example.org",
    "git@github.com:someone/project.git",
    "ratio 16:9, 10:30:00, C:/data",
]


@pytest.mark.parametrize(("text", "hidden"), HELD.items())
def test_a_credential_is_found_and_replaced(text, hidden):
    assert held(text)
    assert hidden not in held(text)
    assert hidden not in redact_text(f"before {text} after")
    assert held(redact_text(text)) is None
    line = json.loads(redact_text(json.dumps({"message": text, "step": 3})))
    assert hidden not in str(line)
    assert line["step"] == 3


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_one_is_left_alone(text):
    assert held(text) is None
    assert redact_text(text) == text


def test_of_secret_access_keys_hardly_one_is_missed():
    draw, letters = random.Random(0), string.ascii_letters + string.digits + "/+"
    found = sum(held("".join(draw.choice(letters) for _ in range(40))) is not None for _ in range(500))
    assert found > 470


SECRET_NAMES = (
    "HF_TOKEN PGPASS PGPASSWORD MYSQL_PWD DB_PASS SLACK_WEBHOOK SLACK_WEBHOOK_URL api_key apiKey KEY_OF_API "
    "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AZURE_STORAGE_KEY WANDB_KEY GITHUBTOKEN TOKEN_HF client_secret"
)
OTHER_NAMES = (
    "num_tokens tokenizer pad_token max_token token_env PGPASSFILE RAY_AUTH_TOKEN_PATH secrets key_frames keypoints "
    "token_dim monkey passes lr WANDB_PROJECT NCCL_DEBUG pass_env url_env secret_name"
)


def test_names_of_credentials_are_told_from_names_of_other_things():
    assert [name for name in SECRET_NAMES.split() if not is_secret_name(name)] == []
    assert [name for name in OTHER_NAMES.split() if is_secret_name(name)] == []


def test_values_are_redacted_at_any_depth_by_name_and_by_form():
    value = {"WANDB_API_KEY": "x", "lr": 0.1, "rows": [("s3://a:b@c", {"password": "p"})], "num_tokens": 5, "n": None}
    assert redact(value) == {
        "WANDB_API_KEY": HIDDEN, "lr": 0.1, "rows": [("s3://***@c", {"password": HIDDEN})], "num_tokens": 5, "n": None
    }  # fmt: skip
    assert redact({"password": "p"}, names=False) == {"password": "p"}
    assert redact({"GOOGLE_APPLICATION_CREDENTIALS": "/etc/keys/gcp.json"})["GOOGLE_APPLICATION_CREDENTIALS"][0] == "/"


def test_what_is_found_is_told_with_its_field_and_without_its_value():
    found = list(find({"a": [{"b": "https://u:hunter2@h"}], "env": {"HF_TOKEN": "hunter2"}}, names=True))
    assert [field for field, _ in found] == ["a.0.b", "env.HF_TOKEN"]
    assert "hunter2" not in str(found)
    assert [field for field, _ in find({"env": {"HF_TOKEN": "hunter2"}})] == []


def test_the_values_of_secret_environment_variables_are_hidden_wherever_they_appear(monkeypatch):
    monkeypatch.setenv("TEAM_TOKEN", "hunter2-hunter2")
    monkeypatch.setenv("TEAM_NAME", "efficient-people")
    assert redact_text("a hunter2-hunter2 of efficient-people") == "a *** of efficient-people"
