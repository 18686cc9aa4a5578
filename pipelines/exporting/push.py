"""Pushing an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from infra.errors import ConfigError, InfraError


def require(repository: str) -> None:
    """ConfigError unless something can be pushed there: a possible name, and a token.

    The token is what `huggingface_hub` finds: `HF_TOKEN`, or the file that its login has written.
    """
    try:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        fix = "pip install 'discrete-stochastic-localization[hub]'"
        raise ConfigError("push", "needs the package huggingface-hub", fix) from None
    try:
        validate_repo_id(repository)
        named = "/" in repository
    except HFValidationError:
        named = False
    if not named:
        raise ConfigError("push", f"{repository!r} is no name on the hub", "Write user/name")
    if not get_token():
        fix = "Set HF_TOKEN to a token that may write there"
        raise ConfigError("push", "there is no token, so nothing is pushed", fix)


def push(folder: Path, repository: str) -> str:
    """Upload a folder as one commit; its address. A repository that does not exist is made, and is
    private until its owner publishes it.

    Raises InfraError where the hub does not answer or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        made = api.upload_folder(
            folder_path=folder, repo_id=repository, commit_message="Export a DSL model"
        )
    except Exception as error:  # of one HTTP library today and another one tomorrow
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        fix = "Check the token's rights and the name; the folder itself is complete"
        raise InfraError("push", f"the hub did not take {repository} ({reason})", fix) from error
    return str(made.commit_url)
