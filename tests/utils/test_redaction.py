"""No secret survives, whatever carries it; ordinary names, numbers and paths stay."""

import html
import json
import random
import string
from urllib.parse import quote, quote_plus

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from foundry_ext.utils import redaction
from foundry_ext.utils.redaction import REDACTED, is_secret_name, redact, remember_secrets

NAMES = [
    *("WANDB_API_KEY", "HF_TOKEN", "hf_token", "token", "auth_token", "apiKey", "api-key"),
    *("password", "aws_secret_access_key", "HUGGING_FACE_HUB_TOKEN", "AWS_SESSION_TOKEN"),
    *("PGPASSWORD", "DB_PASS", "SMTP_PASS", "MYSQLPASS", "GITHUB_PAT", "JWT", "jwt_token"),
    *("HFTOKEN", "GHTOKEN", "FOOTOKEN", "accesstoken", "WANDBKEY", "SharedAccessKey"),
    *("clientSecret", "MYSQL_PWD", "passwords", "api_keys", "db.password", "X-Api-Key"),
    *("variables.hub_token", "private_key", "cookie", "csrf_token", "OAuthToken", "ssh_key"),
]
PLAIN = [
    *("tokens", "max_new_tokens", "pack_tokens", "eos_token", "pad_token_id", "text_key", "by"),
    *("tokenizer", "real_tokens", "seed", "target_modules", "author", "monkey", "keys"),
    *("time/token", "time/token_in_epoch", "loss_token", "pass@1", "compass", "forward_pass"),
    *("pass_rate", "bypass", "glob_pat", "spat", "turkey", "group_key", "EOSTOKEN", "turn_key"),
    *("metrics/eval/TokenAccuracy", "throughput/device/real_tokens_per_sec", "tokens_cut"),
    *("primary_key", "authors", "TOKENIZERS_PARALLELISM", "special_tokens", "sub_token"),
]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(redaction, "_remembered", set())


@pytest.mark.parametrize("name", NAMES)
def test_names_of_secrets(name: str):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", PLAIN)
def test_other_names(name: str):
    assert not is_secret_name(name)


def test_the_names_that_sentry_removes_are_known():
    scrubber = pytest.importorskip("sentry_sdk.scrubber")
    # Sessions of web frameworks, and an address.
    other = {"session", "aiohttp_session", "connect.sid", "_session", "symfony", "user_session"}
    other |= {"x_forwarded_for"}
    assert [name for name in scrubber.DEFAULT_DENYLIST if not is_secret_name(name)] == [
        name for name in scrubber.DEFAULT_DENYLIST if name in other
    ]


P = "planted" * 5
PEM = "-----BEGIN RSA PRIVATE KEY-----\n" + "aB3/" * 16 + "\n-----END RSA PRIVATE KEY-----"
SHAPES = [
    *(f"hf_{P}", f"ghp_{P}", f"ghr_{P}", f"github_pat_{P}", f"glpat-{P}", f"npm_{P}", f"pypi-{P}"),
    *(f"sk-{P}", f"sk-ant-api03-{P}", f"sk_live_{P}", f"xoxb-{P}", f"nvapi-{P}", f"gsk_{P}"),
    *("AKIA" + "A1B2" * 4, "AIza" + "aB3_" * 9, f"eyJ{P}.eyJ{P}.{P}", f"dckr_pat_{P}"),
    *(PEM, PEM.replace("RSA ", ""), PEM.replace("\n", "\\n"), PEM.replace("RSA", "OPENSSH")),
    *(PEM[:70], "wandb_v1_" + P, "ya29." + P, "hvs." + P, "glrt-" + P),
]


@pytest.mark.parametrize("secret", SHAPES)
@pytest.mark.parametrize(
    "text", ["{}", "see {}.", "x={}", "'{}'", 'a\\n{}"', "https://h/?q={}&b=2"]
)
def test_forms_of_secrets(secret: str, text: str):
    left = redact(text.format(secret))
    assert REDACTED in left and "planted" not in left and "aB3" not in left and "A1B2" not in left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://me:s3cret@host/x", f"https://{REDACTED}@host/x"),
        ("https://me:s3/cr#t@host/x", f"https://{REDACTED}@host/x"),
        ("https://me:s@cret@host/x?a@b", f"https://{REDACTED}@host/x?a@b"),
        ("q=https%3A%2F%2Fme%3As3cret%40host%2Fx", f"q=https%3A%2F%2F{REDACTED}%40host%2Fx"),
        ("https://host/x?a=1&token=s3cret&b=2", f"https://host/x?a=1&token={REDACTED}&b=2"),
        ("x%3Fapi_key%3Ds3cret%26b%3D2", f"x%3Fapi_key%3D{REDACTED}%26b%3D2"),
        ("run --api-key=s3cret now", f"run --api-key={REDACTED} now"),
        ("run --password s3cret --seed 1", f"run --password {REDACTED} --seed 1"),
        ("run --password 's3 cret' -x", f"run --password '{REDACTED}' -x"),
        ("['--password', 's3cret', '-x']", f"['--password', '{REDACTED}', '-x']"),
        ('{"api_key": "s3cret", "b": 1}', f'{{"api_key": "{REDACTED}", "b": 1}}'),
        ('{\\"api_key\\": \\"s3cret\\"}', f'{{\\"api_key\\": \\"{REDACTED}\\"}}'),
        ("{'password': 12345, 'b': 1}", f"{{'password': {REDACTED}, 'b': 1}}"),
        ("('api_key', 's3cret')", f"('api_key', '{REDACTED}')"),
        ("pass: 482913", f"pass: {REDACTED}"),
        ("cookie: 3f9a; b=1", f"cookie: {REDACTED}"),
        ("x%2Fmy-api_key%3Ds3cret", f"x%2Fmy-api_key%3D{REDACTED}"),
        (
            '\\\\\\"api_key\\\\\\": \\\\\\"s3cret\\\\\\"',
            f'\\\\\\"api_key\\\\\\": \\\\\\"{REDACTED}\\\\\\"',
        ),
        ("api_key: s3cret", f"api_key: {REDACTED}"),
        ("a: 1\n  password: s3 cret\nb: 2", f"a: 1\n  password: {REDACTED}\nb: 2"),
        ("PGPASSWORD=s3cret psql", f"PGPASSWORD={REDACTED} psql"),
        ('password = "s3 cret"', f'password = "{REDACTED}"'),
        ("login(token='s3cret', x=1)", f"login(token='{REDACTED}', x=1)"),
        ("Authorization: Bearer abc.def-123", f"Authorization: Bearer {REDACTED}"),
        ("machine x login user password s3cret", f"machine x login user password {REDACTED}"),
    ],
)
def test_secrets_beside_their_names(text: str, left: str):
    assert redact(text) == left
    assert redact(left) == left


@pytest.mark.parametrize(
    "text",
    [
        *("sk-learn-baseline-lora-17", "r8_lora_smollm2_135m_seed_17_gs"),  # names of runs
        *("xai-lora-smollm2-135m-seed17-x", "fw_lora_r16_seed17_gsm8k_lr1e-3"),
        *("eos_token=<|endoftext|>", "hf://datasets/a/b@main", "outputs/hf_export", "task-list"),
        *("token=token", "f(token=self.token)", "use_auth_token: true", "token=None", "token: 512"),
        *("time/token: 81920", "Train time/token: 81920", "pass@1=0.25", "https://host:8080/a@b"),
        *("InvalidToken Error: x", "basic arithmetic is hard", "the password is asked for"),
        *("commit 477dd3a9b1c2d3e4f5a6b7c8d9e0f1a2b3c4d5e6", "s3://bucket/run@2/x", "a b c: d"),
        *("usage: x [--password PASSWORD] [--seed N]", "tokenizers==0.21.1", "-----BEGIN X-----"),
        *("pass: 0.5", "the first pass: 12 of 30", "signature: (a, b)", "cookie: 3 cups"),
        *("pass=98%", "its signature: (self, x)", "BadSignatureError: wrong bytes"),
        *("git@github.com:a/b", "pypi-simple", "npm_config"),
    ],
)
def test_ordinary_text_stays(text: str):
    assert redact(text) == text


CARRIERS = {
    "json": lambda name, value: json.dumps({"a": 1, name: value}),
    "nested json": lambda name, value: json.dumps({"text": json.dumps({name: value})}),
    "repr": lambda name, value: repr({"a": [{name: value}]}),
    "yaml": lambda name, value: yaml.safe_dump({"a": {name: value}}, width=10**6),
    "override": lambda name, value: f"{name}={value}",
    "flag": lambda name, value: f"--{name}={value}",
    "argv": lambda name, value: repr([f"--{name}", value]),
    "query": lambda name, value: f"https://host/x?{name}={quote(value, safe='')}&b=2",
}
CHARACTERS = string.ascii_letters + string.digits + "._~/+!$%*:@#()<>[]{}^|?-"
secrets = st.text(CHARACTERS, min_size=9, max_size=40).filter(
    # A form by itself, in the quotes of every carrier: a text that begins as a name, as a
    # flag, as a list or as a number of tokens may be one.
    lambda text: text[0].isalpha() and not text.isalpha() and not is_secret_name(text)
)


@pytest.mark.parametrize("carrier", CARRIERS)
@given(name=st.sampled_from(NAMES), secret=secrets)
@settings(max_examples=60, deadline=None)
def test_no_secret_survives_beside_its_name(carrier: str, name: str, secret: str):
    text = CARRIERS[carrier](name, secret)
    left = redact(text)
    for form in (secret, quote(secret, safe="")):
        assert form not in left and form[: len(form) // 2 + 3] not in left, (text, left)
    assert REDACTED in left


@given(st.text(string.ascii_letters + string.digits, min_size=4, max_size=12))
def test_a_key_in_base64url_is_no_name(part: str):
    """Its dashes may stand close together."""
    assert (
        redact(f"tgp_v1_{'_'.join([part, 'Zy8-x', part, 'qW-e_7r', part, 'k2-T'] * 2)}") == REDACTED
    )


anything = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=8, max_size=40)
FORMS = {
    "plain": str,
    "repr": repr,
    "repr of a repr": lambda value: repr(repr(value)),
    "json": json.dumps,
    "json of a text with json": lambda value: json.dumps(f"x {json.dumps(value)}"),
    "json of a repr": lambda value: json.dumps(repr(value)),
    "quoted": lambda value: quote(value, safe=""),
    "path": quote,
    "form": quote_plus,
    "html": html.escape,
    "yaml": lambda value: yaml.safe_dump({"a": value}, allow_unicode=True, width=10**6),
}


@example(secret="000000${", form="plain")  # no interpolation
@given(secret=anything.filter(lambda text: text == text.strip()), form=st.sampled_from(list(FORMS)))
@settings(max_examples=300, deadline=None)
def test_no_known_secret_survives_anywhere(secret: str, form: str):
    redaction._remembered.clear()
    remember_secrets({"variables": {"api_key": secret}})
    shown = FORMS[form](secret)
    left = redact(f"before {shown} after")
    assert secret not in left.replace(REDACTED, "") and REDACTED in left, (shown, left)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_ordinary_values_stay(data):
    name = data.draw(st.sampled_from(PLAIN))
    number = st.one_of(st.integers(0, 10**9), st.floats(0, 1e6, allow_nan=False))
    value = data.draw(st.one_of(number, st.sampled_from(["<|im_end|>", "outputs/a-b_1", "adamw"])))
    for show in CARRIERS.values():
        text = show(name, str(value))
        assert redact(text) == text
        text = show(name, value) if show is not CARRIERS["query"] else str(value)
        assert redact(text) == text
    assert redact({name: value}) == {name: value}


def test_what_a_configuration_and_a_command_line_hold_is_known_everywhere():
    remember_secrets(
        {
            "variables": {"api_key": "abc def/ghi", "url": "https://me:pa%2Fss-word@host/x"},
            "hf_kwargs": [{"token": "to-ken-1"}],
            "use_auth_token": True,
            "short": {"password": "ab"},
            "reference": {"password": "${variables.api_key}"},
        }
    )
    remember_secrets(["run.yaml", "variables.hub_token='from line'", "--password", "next word"])
    left = redact(
        "abc def/ghi abc%20def%2Fghi pa/ss-word to-ken-1 from line next word ab ${variables"
    )
    assert left == " ".join([*[REDACTED] * 6, "ab ${variables"])


def test_lists_of_arguments():
    given = ["x", "--password", "s3cret", "--token", "--seed", "3", "a.api_key=s3&cret"]
    left = ["x", "--password", REDACTED, "--token", "--seed", "3", f"a.api_key={REDACTED}"]
    assert redact(given) == left


def test_a_long_text_takes_no_long_time():
    rng = random.Random(1)
    text = " ".join(
        rng.choice(['"', "a=", "token", "x:", "\\", "--b", "https://"]) for _ in range(9999)
    )
    redact(text)
    redact("a" * 10**5)
    redact("-" * 10**5)
    redact('\\"' * 10**4)
