"""Models of the Hugging Face Hub: which of their files are wanted, and downloading them."""

from pathlib import Path

from inheritune.config.source_shape import HUB_ID
from inheritune.data.tokenizer_files import TOKENIZER_PATTERNS
from inheritune.errors import UserError, is_machine_limit
from inheritune.files.hub import explain_gated
from inheritune.models.weight_files import WEIGHTS, list_weight_patterns

COMMON_FILES = ["config.json", "generation_config.json", "adapter_config.json", *TOKENIZER_PATTERNS]
"""Patterns of the files that are wanted besides the weights."""


def download_model(repo: str, revision: str | None) -> Path:
    """Return the folder of the Hub's snapshot of `repo`: config, tokenizer and weights.

    The weights are safetensors, or .bin where there are none. With HF_HUB_OFFLINE=1 only the cache is used.
    Raises UserError if the model is in neither."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not HUB_ID.fullmatch(repo):
        raise UserError(f"source '{repo}' is neither a folder nor a Hub id (owner/name)")
    try:
        for stem, suffix in WEIGHTS:
            patterns = [*COMMON_FILES, *list_weight_patterns(stem, suffix)]
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
            if any(folder.glob(f"{stem}*{suffix}")):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if is_machine_limit(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise explain_gated(error, f"'{repo}'", repo) or UserError(
            f"'{repo}' is not a local folder and is not available from the Hub ({reason}); download it first"
        ) from None
    return folder
