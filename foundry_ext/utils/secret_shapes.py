"""Names that secrets have, and forms by which they are known without a name.

No package of the lock keeps such lists for arbitrary text. sentry-sdk has one of web frameworks'
names, which tests/utils/test_redaction.py compares with ours.
"""

import re
from functools import lru_cache

# A name is secret if one of its words is, or ends in, one of these: DB_PASSWORD, PGPASSWORD.
_SECRET_ENDINGS = (
    *("apikey", "credential", "credentials", "passphrase", "passwd", "password", "secret"),
    *("accesskey", "privatekey", "secretkey", "csrftoken"),
)
_SECRET_WORDS = {
    *("auth", "authorization", "bearer", "cookie", "csrf", "jwt", "oauth", "pwd", "xsrf"),
    *("sessionid", "phpsessid"),
    *("sig", "signature"),  # of a signed URL, which gives access to whoever has it
}
_SERVICES = {
    *("ado", "anthropic", "aws", "azure", "cohere", "comet", "databricks", "docker", "gcp", "gh"),
    *("git", "github", "gitlab", "google", "groq", "hf", "huggingface", "mistral", "mlflow"),
    *("neptune", "ngc", "npm", "nvidia", "openai", "pypi", "replicate", "slack", "wandb"),
}
# A key is secret after one of these words: `api_key` is, `text_key` is not.
_SECRET_KEYS = _SERVICES | {
    *("access", "account", "api", "deploy", "encryption", "license", "private", "secret"),
    *("service", "shared", "signing", "ssh", "subscription"),
}
# A name that ends in `token` is not secret after these words: `eos_token`, `time/token`.
_PLAIN_TOKENS = {
    *("additional", "audio", "begin", "bos", "class", "cls", "current", "decoder", "each", "end"),
    *("eos", "eot", "every", "fim", "first", "image", "input", "last", "loss", "mask", "max"),
    *("middle", "min", "new", "next", "num", "of", "output", "pad", "padding", "per", "prefix"),
    *("previous", "prompt", "real", "sep", "sot", "source", "special", "start", "sub", "suffix"),
    *("target", "text", "time", "unit", "unk", "unknown", "video", "word"),
}
# `forward_pass` and `glob_pat` are no secrets, `DB_PASS` and `GITHUB_PAT` are.
_PLAIN_PASSES = {
    *("all", "backward", "band", "bwd", "by", "did", "each", "eval", "extra", "first", "forward"),
    *("full", "fwd", "high", "is", "last", "low", "multi", "n", "not", "num", "one", "per"),
    *("second", "single", "test", "third", "train", "two", "will"),
}
_PLAIN_PATS = {
    *("date", "exclude", "file", "glob", "include", "key", "match", "name", "path", "re", "regex"),
    *("search", "split", "time", "url"),
}
_PASS_OWNERS = {
    *("admin", "db", "ftp", "ldap", "mail", "mongo", "mysql", "pg", "proxy", "redis", "root"),
    *("smtp", "ssh", "ssl", "user"),
}
_TOKEN_OWNERS = _SERVICES | {
    *("access", "api", "auth", "bearer", "bot", "ci", "hub", "id", "my", "refresh", "session"),
    "user",
}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Return whether a key holds a secret, as `WANDB_API_KEY`, `hf_token` or `password` do."""
    words = [part for word in _WORDS.findall(name) for part in _parts(word)]
    for before, word in zip(["", *words], words, strict=False):
        single = word.removesuffix("s")
        if word in _SECRET_WORDS or single in _SECRET_WORDS or single.endswith(_SECRET_ENDINGS):
            return True
        if word.endswith(_SECRET_ENDINGS) or (single == "key" and before in _SECRET_KEYS):
            return True
    *others, last = words or [""]
    if last == "token":
        return not set(others) & _PLAIN_TOKENS
    if last == "tokens":
        return bool({"api", "auth", "access", "hf"} & set(others))
    before = others[-1] if others else ""
    if last == "pass":
        return before not in _PLAIN_PASSES
    return last == "pat" and bool(before) and before not in _PLAIN_PATS


def _parts(word: str) -> list[str]:
    """Return HFTOKEN as [hf, token], and likewise MYSQLPASS, WANDBKEY, GHPAT; monkey stays."""
    lower = word.lower()
    for ending, owners in (
        ("token", _TOKEN_OWNERS),
        ("key", _SECRET_KEYS),
        ("pass", _PASS_OWNERS),
        ("pat", _SERVICES),
    ):
        owner = lower.removesuffix(ending)
        if owner != lower and owner in owners:
            return [owner, ending]
        if ending == "token" and word.isupper() and 0 < len(owner) < len(lower):
            return [owner, ending]  # of any owner in an environment variable: FOOTOKEN
    return [lower]


# The forms are those of each service's own documentation, collected in GitHub's list of supported
# secret scanning patterns and in the rules of gitleaks. Lengths are a little below the real ones.
SHAPES = re.compile(
    r"""(?:(?<![A-Za-z0-9])|(?<=%[0-9A-Fa-f]{2})|(?<=\\[nrt]))(?:
        (?:hf|api_org)_[A-Za-z0-9]{16,}                      # Hugging Face
        | wandb_v1_\w{16,} | local-[0-9a-f]{40}              # W&B; its plain keys are bare hex
        | gh[oprsu]_[A-Za-z0-9]{16,} | github_pat_\w{16,}    # GitHub
        | gl(?:agent|cbt|dt|ft|imt|oas|pat|ptt|rt|soat)-[\w-]{10,}  # GitLab
        | npm_[A-Za-z0-9]{16,}
        | pypi-(?:[A-Za-z0-9_]{16,}|Ag[\w-]{14,})[\w-]*      # a macaroon, base64
        | rubygems_[0-9a-f]{32,} | dckr_[a-z]+_[\w-]{16,}
        # OpenAI, Anthropic, inference. What tells them from names of runs: 16 characters without a
        # dash, or in a long one, which may be base64url, capitals and digits.
        | (?:sk-|gsk_|xai-|r8_|pplx-|nvapi-|fw_|tgp_v1_|csk-|jina_)
          (?=[\w-]{0,400}?[A-Za-z0-9]{16}|(?=[\w-]{0,400}?[A-Z])(?=[\w-]{0,400}?\d)[\w-]{40})
          [\w-]{16,}
        | lsv2_[a-z]{2}_\w{16,}                              # LangSmith
        | [prs]k_(?:live|test)_[A-Za-z0-9]{10,} | whsec_[A-Za-z0-9+/=]{16,}  # Stripe
        | xox[a-z]-[\w-]{10,} | xapp-[\w-]{16,}              # Slack
        | (?:A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA)[A-Z0-9]{16}    # AWS
        | AIza[\w-]{30,} | ya29\.[\w-]{16,} | GOCSPX-[\w-]{20,}  # Google
        | dapi[0-9a-f]{32} | do[opr]_v1_[0-9a-f]{32,}        # Databricks, DigitalOcean
        | hv[bs]\.[\w-]{16,} | pul-[0-9a-f]{40}              # Vault, Pulumi
        | SG\.[\w-]{16,}\.[\w-]{16,} | shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}  # SendGrid, Shopify
        | ATATT3[\w=-]{16,} | lin_api_[A-Za-z0-9]{16,} | ntn_[A-Za-z0-9]{16,}
        | \d{8,10}:AA[\w-]{32,} | AGE-SECRET-KEY-1[0-9A-Z]{16,}  # Telegram, age
        | eyJ[\w-]{8,4000}\.[\w-]{8,}\.[\w-]*               # JSON web token, RFC 7519
    )""",
    re.VERBOSE,
)
WEBHOOKS = re.compile(
    r"(?<=hooks\.slack\.com/)[\w/-]{16,}|(?<=discord\.com/api/webhooks/)[\w/-]{16,}"
)
PRIVATE_KEY_START = r"-----BEGIN[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
PRIVATE_KEY_END = r"-----END[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
# RFC 7468. A key that was cut off before its end takes the rest of the text with it.
PRIVATE_KEY = re.compile(rf"{PRIVATE_KEY_START}(?:(?!-----END)[\s\S])*(?:{PRIVATE_KEY_END})?")
# Up to the last @ before the path. In the second form the password has / ? or # in it; a port
# is no password.
URL_LOGIN = re.compile(
    r"""(?<=://)(?:[^\s/?#'"<>\\]+|[^\s:/@'"]*:(?!\d{1,5}(?:[/?#\s'"]|$))[^\s'"]*)(?=@)"""
)
ENCODED_LOGIN = re.compile(r"""(?i:(?<=%3A%2F%2F)(?:(?!%2F|%40)[^\s'"])+(?=%40))""")
# What URL_LOGIN is sought in: without an @ ahead, each `://` would be followed to the word's end.
UP_TO_LAST_AT = re.compile(r"""(?<![^\s'"])[^\s'"]*@""")
# HTTP's Authorization. "basic arithmetic" is prose.
BEARER = re.compile(
    r"(?i:\b(bearer)\s+)(?=[\w.~+/=-]{16}|[A-Za-z]*[\d.~+/=_-])[\w.~+/=-]{8,}"
    r"|(?i:\b(basic)\s+)(?=[A-Za-z]*[\d+/=]|[A-Za-z]*[a-z][A-Z])[\w+/=-]{8,}"
)
