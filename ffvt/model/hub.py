"""Weights by name: from the Hugging Face Hub, and to it, through its own client and cache.

huggingface_hub is needed for names only; its settings count (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT).
"""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from ffvt.errors import printable

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
WEIGHT_SUFFIXES = (".npz", ".safetensors", ".bin", ".pt", ".pth")
REPOSITORY = r"(?:hf:|hf-hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?"
CARD = """---
{{ card_data }}
---

# {{ repo_id }}

{{ what }}

```python
import ffvt

model = ffvt.load_pretrained("{{ repo_id }}")  # in evaluation mode
logits = model(images)  # images ({{ shape }}), normalised as in training
```

{{ facts }}
"""
KINDS = {  # of our models: what one is
    "vit": "A plain Vision Transformer (ViT) for fine-grained images.",
    "ffvt": "A Feature Fusion Vision Transformer (FFVT) for fine-grained images: each layer picks {num_select} tokens "
    "by {criterion}, its last layer fuses them.",
    "transfg": "A TransFG for fine-grained images: each of its {num_heads} heads picks a patch from all layers, its "
    "last layer sees these.",
}


def locate(where: str, source: str | Path, **download: Any) -> Path:
    """The file or folder that a source names, downloaded where it is a name of the Hub.

    Args:
        where: the function that was called, for its messages.
        source: a path; "timm:NAME", a model of timm with its pretrained weights; "hf:ORG/NAME" or "hf-hub:ORG/NAME", a
            repository of the Hub, "@REVISION" behind it for one of its revisions; or plain "ORG/NAME" where no such
            file or folder exists.
        download: arguments of huggingface_hub.hf_hub_download (revision, token, cache_dir, ...).

    Returns:
        The path itself; or the folder of the repository in the Hub's cache, with model.safetensors in it and, where
        the repository has one, config.json. Nothing else is downloaded: no pickle, no code.

    Raises:
        ConnectionError: the Hub cannot be reached; the message says what to download by hand.
        FileNotFoundError: no such repository, revision or file. PermissionError: it asks for a login.
        ValueError: a malformed or unknown name. ImportError: no huggingface_hub (no timm for "timm:").
    """
    name = str(source)
    if name.startswith("timm:"):
        name = _timm_repository(where, name.removeprefix("timm:"))
    elif not name.startswith(("hf:", "hf-hub:")) and not _is_name(name):
        return Path(source)
    found = re.fullmatch(REPOSITORY, name)
    if found is None:
        must = "hf:ORG/NAME or hf:ORG/NAME@REVISION"
        raise ValueError(f"{where}: a repository must be {must}; got source={printable(repr(name))}")
    if found[2]:
        download["revision"] = found[2]
    weights = _download(where, found[1], WEIGHTS_FILE, download)
    _download_config(found[1], download)
    return weights.parent


def _is_name(name: str) -> bool:
    """Whether a plain source is a repository's name rather than a path."""
    if not re.fullmatch(REPOSITORY, name) or name.startswith(".") or name.endswith(WEIGHT_SUFFIXES):
        return False
    return not os.path.lexists(name) and not os.path.isdir(name.partition("/")[0])


def _timm_repository(where: str, name: str) -> str:
    try:
        from timm.models import get_pretrained_cfg, list_pretrained
    except ImportError as error:
        raise ImportError(f"{where}: weights by timm's names need timm (pip install 'ffvt[timm]')") from error
    try:
        settings = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # no such model, or no such weights of it
        near = get_close_matches(name, list_pretrained(), 3)
        hint = f" (near: {', '.join(near)})" if near else " (timm.list_pretrained() lists them)"
        raise ValueError(f"{where}: timm must know the model; got {printable(repr(name))}{hint}") from None
    if not settings.hf_hub_id:
        known = list_pretrained(f"{name.partition('.')[0]}*")[:3]
        hint = f" (there are {', '.join(known)})" if known else ""
        raise ValueError(f"{where}: timm must have weights of the model on the Hub; got {printable(repr(name))}{hint}")
    return f"hf:{settings.hf_hub_id}"


def _download(where: str, repository: str, file: str, options: dict[str, Any]) -> Path:
    revision = options.get("revision") or "main"
    by_hand = f"download https://huggingface.co/{repository}/resolve/{revision}/{file} and give the file instead"
    by_hand += " (--pretrained_dir FILE)" if where == "load_weights" else f", in a folder with its {CONFIG_FILE}"
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        must = "weights by name need huggingface_hub (pip install huggingface_hub)"
        raise ImportError(f"{where}: {must}; or {by_hand}; got source={repository!r}") from error
    problems = [  # the first that fits: the Hub's errors are kinds of one another
        (errors.GatedRepoError, PermissionError, "asks for a login (hf auth login) and for its terms to be accepted"),
        (errors.RepositoryNotFoundError, FileNotFoundError, "is no repository, or a private one (hf auth login)"),
        (errors.RevisionNotFoundError, FileNotFoundError, f"has no revision {revision!r}"),
        (
            errors.LocalEntryNotFoundError,
            ConnectionError,
            f"is not in the cache, and the Hub cannot be reached; {by_hand}",
        ),
        (errors.EntryNotFoundError, FileNotFoundError, f"has no {file}; weights in pickles are not downloaded"),
        (errors.HFValidationError, ValueError, "is no name of a repository"),
        ((errors.HfHubHTTPError, OSError), ConnectionError, f"cannot be downloaded; {by_hand}"),
    ]
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, **options))
    except tuple(kind for kinds, *_ in problems for kind in (kinds if isinstance(kinds, tuple) else (kinds,))) as error:
        kind, problem = next((raised, text) for caught, raised, text in problems if isinstance(error, caught))
        cause = error.__cause__ or error
        offline = isinstance(cause, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else printable(str(cause).partition("\n")[0])
        raise kind(f"{where}: {printable(repository)} {problem}; got: {reason}") from error


def _download_config(repository: str, options: dict[str, Any]) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    with suppress(EntryNotFoundError):  # it has none, or the cache has none and there is no network: optional
        huggingface_hub.hf_hub_download(repository, CONFIG_FILE, **options)


def push(
    model: nn.Module,
    repository: str,
    *,
    private: bool | None,
    token: str | bool | None,
    branch: str | None,
    create_pr: bool,
    commit_message: str,
    license: str,
) -> str:
    """Uploads what `save_pretrained` writes, and a model card where the repository has none; the commit's address."""
    try:
        from huggingface_hub import HfApi, ModelCard, ModelCardData
    except ImportError as error:
        raise ImportError("push_to_hub: it needs huggingface_hub (pip install huggingface_hub)") from error
    api = HfApi(token=token)
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if not api.file_exists(repository, "README.md", revision=branch):
            config = model.config
            data = ModelCardData(
                library_name="ffvt",
                license=license,
                pipeline_tag="image-classification",
                tags=["ffvt", "vision-transformer", "fine-grained", "pytorch"],
            )
            facts = f"{config.embed_dim} channels, {config.depth} blocks, {config.num_heads} heads, patches of "
            facts += f"{config.patch_size} pixels, {config.num_classes} classes."
            told = {"shape": f"B, 3, {config.image_size}, {config.image_size}", "facts": facts}
            told["what"] = KINDS[config.kind].format(**asdict(config))
            card = ModelCard.from_template(data, template_str=CARD, repo_id=repository, **told)
            card.save(Path(folder) / "README.md")
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
    return str(commit)
