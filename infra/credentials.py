"""Keeping credentials out of URLs, messages and files: they come from the environment or a role."""

from __future__ import annotations

import os
import re

from infra.errors import ConfigError

CREDENTIAL = re.compile(  # of a URL, alone or in a list
    r"""(^|["'])[\w+.-]+://([^/\s"']*@|[^\s"']*[?&](?=[^=&?\s]*=)[^=&?\s]*"""
    r"""(signature|sig|token|secret|password|credential|key))""",
    re.IGNORECASE,
)
SECRETS = (  # variables whose values no message may show
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"),
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN", "HF_TOKEN"),
)


def refuse_credentials(text: str, where: str) -> None:
    """ConfigError if a URL in the text holds a credential, which a run's records would show."""
    if CREDENTIAL.search(text):
        fix = "Give it through the environment, a profile or a role instead"
        raise ConfigError(where, "the URL holds a credential", fix)


def scrub(text: str) -> str:
    """The text without credentials: those of URLs, and values of the variables in SECRETS."""
    text = re.sub(r"(?<=://)[^/\s]*@", "", text)
    text = re.sub(r"\?[^\s'\"]*", _without_values, text)
    for name in SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "…")
    return text


def _without_values(query: re.Match[str]) -> str:
    return "?…" if re.search("=|%3D", query[0]) else query[0]
