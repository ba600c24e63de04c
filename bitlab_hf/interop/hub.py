"""A model's folder onto the hub, in one commit: what it needs to load, and nothing else."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from transformers import PreTrainedModel

from bitcore.errors import ArgumentError, BitLabError
from bitlab_hf.checkpoint.card import CARD, renamed
from bitlab_hf.checkpoint.facts import Facts
from bitlab_hf.checkpoint.files import INDEX, companions, read_config, scheme_of, weight_files
from bitlab_hf.checkpoint.saving import save

logger = logging.getLogger("bitlab")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin")
_ADVICE = {
    401: "Run `hf auth login`, or set HF_TOKEN to a token that may write.",
    403: "The token needs the right to write there; make one in the hub's settings.",
    404: "Check the name, and that the token may see it.",
    409: "Something else writes to it; run the command again.",
    429: "Wait a while and run the command again; files that arrived are not sent again.",
}
_AGAIN = "Run the command again; files that arrived are not sent again."


class HubError(BitLabError, OSError):
    """The hub refused, or could not be reached."""


def push(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    tokenizer: Any = None,
    facts: Facts | None = None,
    private: bool = True,
    latent: bool = False,
    token: str | None = None,
    message: str = "Upload a ternary model",
) -> str:
    """Uploads a model, or a model's folder: weights, configuration, tokenizer and model card.

    Of a folder, only files that transformers or BitLab write under these names are taken, and the
    licence; no links, pickles or folders. A warning names what is left out.
    Everything becomes visible in one commit, which also removes weight files of a previous upload.
    After an interruption, running it again sends only what has not arrived.

    Args:
        model: A ternary transformers model, or a folder as `save` or `export_bitnet` wrote it.
        repo_id: ``"name/model"``; made if needed.
        tokenizer: Goes with a model; a folder has its own.
        facts: What the card of a model says beside what the model shows; a folder has its own.
        private: Whether to make it private; one that exists stays as it is.
        latent: Whether latent weights may be uploaded.
        token: An access token; default the one that is logged in.
        message: Of the commit.

    Returns:
        The commit's address.

    Raises:
        ArgumentError: The folder holds no ternary model, holds latent weights without ``latent``,
            repo_id is no name, there is no token, or tokenizer or facts come with a folder.
        CheckpointError: Weight files are missing, or config.json is damaged.
        ConfigError: BitLab does not know the scheme.
        HubError: The hub refused or could not be reached; the message says what to do.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ArgumentError(f"push: repo_id must be 'name/model', got {repo_id!r}") from error
    if isinstance(model, PreTrainedModel):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / repo_id.rpartition("/")[2]
            save(model, folder, tokenizer=tokenizer, facts=facts)
            return _upload(folder, repo_id, private, latent, token, message)
    if tokenizer is not None or facts is not None:
        raise ArgumentError(
            "push: tokenizer and facts must be left out for a folder, got them given\n"
            "Save them into it: bitlab_hf.save(model, folder, tokenizer=..., facts=...)."
        )
    return _upload(Path(model), repo_id, private, latent, token, message)


def _upload(
    folder: Path, repo_id: str, private: bool, latent: bool, token: str | None, message: str
) -> str:
    files = _files(folder, latent)
    token = token or get_token()
    if token is None:
        raise ArgumentError(f"push: a token must be given, got none\n{_ADVICE[401]}")
    additions = [
        CommitOperationAdd(file.name, _card(file, repo_id) if file.name == CARD else file)
        for file in files
    ]
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        names = {file.name for file in files}
        stale = [
            CommitOperationDelete(name)
            for name in api.list_repo_files(repo_id)
            if name.endswith(_WEIGHTS) and name not in names
        ]
        commit = api.create_commit(repo_id, [*stale, *additions], commit_message=message)
    except Exception as error:
        if isinstance(error, BitLabError) or not _is_of_the_hub(error):
            raise
        raise HubError(_explained(error, repo_id)) from error
    return str(commit.commit_url)


def _files(folder: Path, latent: bool) -> list[Path]:
    """Returns what is to be uploaded."""
    scheme = scheme_of(read_config(folder).get("quantization_config"), str(folder))
    if scheme is None:
        raise ArgumentError("push: the folder must hold a ternary model, got floats")
    if scheme["weight_format"] == "latent" and not latent:
        raise ArgumentError(
            "push: the weights must be packed, got latent ones\n"
            "Deploy the model first (bitlab deploy), or pass latent=True (--latent)."
        )
    weights = weight_files(folder, "push")
    index = [folder / INDEX] if (folder / INDEX).exists() else []
    for file in (folder / "config.json", *index, *weights):
        if file.is_symlink():
            raise ArgumentError(
                f"push: {file.name} must be a file of the folder itself, got a link\n"
                "Copy the folder with what its links lead to: cp -rL."
            )
    chosen = [*weights, *index, *companions(folder)]
    names = {file.name for file in chosen}
    left = sorted(entry.name for entry in folder.iterdir() if entry.name not in names)
    if left:
        shown = ", ".join(map(repr, left[:20])) + (f" and {len(left) - 20} more" * (len(left) > 20))
        logger.warning("push: left out: %s", shown)
    return chosen


def _card(file: Path, repo_id: str) -> bytes:
    """Returns the model card, which loads the model by its name on the hub."""
    text = file.read_text(encoding="utf-8")
    return renamed(text, file.resolve().parent.name, repo_id).encode()


def _is_of_the_hub(error: Exception) -> bool:
    """Tells whether an error came from the client: its own, or one of its HTTP library.

    The library's name depends on the client's version.
    """
    return isinstance(error, (OSError, RuntimeError)) or type(error).__module__.startswith("httpx")


def _explained(error: Exception, repo_id: str) -> str:
    # The client wraps what goes wrong with one file.
    causes = [cause for cause in (error, error.__cause__) if cause is not None]
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answer is None:
        return f"push: the hub must be reachable, got: {causes[-1]}\n{_AGAIN}"
    status = answer.response.status_code
    detail = answer.server_message or answer.response.reason_phrase
    advice = _ADVICE.get(status, _AGAIN)
    return f"push: {repo_id} must accept the upload, got {status} ({detail})\n{advice}"
