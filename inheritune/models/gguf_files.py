"""GGUF files (llama.cpp's format, mostly quantized) as sources, through transformers' own reader.

Their tensors are no byte ranges of floats, so such a file is converted once: dequantized to fp32, with its
tokenizer, into a folder under $INHERITUNE_ROOT/data/gguf, which is then the source.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from inheritune.errors import UserError, is_machine_limit
from inheritune.files.json_files import write_json
from inheritune.files.markers import COMPLETE, hash_file, hash_folder
from inheritune.files.storage import find_root
from inheritune.files.writing import replace_atomically
from inheritune.models.gguf_tokenizers import mend_splitting
from inheritune.models.weight_files import WEIGHTS
from inheritune.runtime.log import logger

FORM = 2
"""The form of the conversions. Those of form 1 had tokenizers that split text as transformers does."""


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that `path` is, or that the folder `path` holds for its only weights; else None.

    Raises UserError if there are several, of which one is to be named."""
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    if not path.is_dir() or any(any(path.glob(f"{stem}*{suffix}")) for stem, suffix in WEIGHTS):
        return None
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf" and file.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise UserError(f"{path} holds {len(found)} GGUF files ({names}); give one of them as the source")
    return found[0] if found else None


def convert_gguf(file: Path) -> Path:
    """Return the folder of the weights in `file` as fp32 safetensors, with config and tokenizer.

    It is made once for each content. Raises UserError without the package `gguf`, and if transformers cannot
    read the file."""
    folder = find_root() / "data" / "gguf" / f"{file.stem}-{hash_file(file)[:16]}-{FORM}"
    if (folder / COMPLETE).is_file():
        return folder
    if find_spec("gguf") is None:
        raise UserError(f"{file} is a GGUF file, which needs the package gguf: pip install gguf")
    logger.info("%s: dequantizing to fp32, into %s", file, folder)
    model, tokenizer = read_gguf(file)
    with replace_atomically(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / COMPLETE, {"files": hash_folder(temporary), "source": str(file.absolute())})
    return folder


def read_gguf(file: Path) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a GGUF file, the weights in fp32. Raises UserError if transformers cannot
    read it as the model that it is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # transformers and gguf raise many kinds: cut off, of another family
        if is_machine_limit(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file} cannot be read as a GGUF model by transformers: {reason}") from None
    model, report = found
    if report["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(
            f"{file} lacks the tensors {', '.join(sorted(report['missing_keys'])[:3])}, as transformers "
            f"reads it; use the safetensors of this model"
        )
    _check_all_is_read(file, model, tokenizer)
    vars(model.config).pop("quantization_config", None)
    return model, tokenizer


HARMLESS = {
    "vocab_size",
    "rope.dimension_count",
    "attention.causal",
    "attention.key_length",
    "attention.value_length",
}
"""Settings of a GGUF model that follow from its tensors' shapes, or that every decoder has."""


def _check_all_is_read(file: Path, model: Any, tokenizer: Any) -> None:
    """Raise UserError if the file holds tensors or settings of the model that transformers passed over, such
    as the frequencies of Llama 3.1's rotary embedding: the model would be another one. What was passed over
    of the tokenizer is made up for."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    if unread := _find_unread_setting(reader, model.config) or _find_unread_tensor(reader, model):
        raise UserError(
            f"{file} holds {unread}, which transformers does not read: the model would be another one; use "
            f"the safetensors of this model"
        )
    mend_splitting(reader, tokenizer, file)


def _find_unread_setting(reader: Any, config: Any) -> str | None:
    """Return the name of a setting of the model that transformers does not read, or None."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    family = reader.fields["general.architecture"].contents()
    renamed = {
        "gpt-oss": "gpt_oss",
        "qwen2moe": "qwen2_moe",
        "qwen3moe": "qwen3_moe",
        "minimax-m2": "minimax_m2",
    }
    known: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    read = {*known.get(family, {}), *known.get(renamed.get(family, family), {}), *HARMLESS}
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    scaled = rope.get("rope_type", "default") != "default"
    no_scaling = reader.fields.get(f"{family}.rope.scaling.type")
    scales = not (scaled or no_scaling is not None and no_scaling.contents() == "none")
    for name in reader.fields:
        prefix, _, key = name.partition(".")
        if prefix == family and key not in read and (scales or not key.startswith("rope.scaling.")):
            return f"the setting {name}"
    return None


def _find_unread_tensor(reader: Any, model: Any) -> str | None:
    """Return the name of a tensor that transformers does not read, or how many elements it passed over, or
    None."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    taken = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    unread = sum(int(tensor.n_elements) for tensor in reader.tensors) - sum(taken.values())
    if not unread:
        return None
    known = get_gguf_hf_weights_map(model, TensorProcessor(config=model.config.to_dict()))
    names = [tensor.name for tensor in reader.tensors if tensor.name not in known]
    return f"the tensor {names[0]}" if names else f"{unread} elements"
