"""Attention maps of a model, measured layer by layer.

The model reads N seeded windows of T validation tokens (causal, no BOS added). Every layer's maps are
measured as soon as they are computed and then dropped, so that one layer's attention is in memory at a time.
`measure_model` returns the rows of attention.jsonl: `header`, `layer` (counted from 0), `group`, `map` and
`summary`; where costs are measured (costs.py) also `first`, `window` and `cut`. paper/attention_plots.py
draws them, counting from 1.

Legend of suffixes: N = sequences, B = sequences of one batch, H = heads, T = tokens, F = fractions (tau or
eta), M = matrices.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from inheritune.analysis.layers import summarize_groups, summarize_layer, summarize_model
from inheritune.analysis.measures import approximate_rank, column_mass, measure_uniform
from inheritune.analysis.thresholds import ETAS, LENGTH, NEAR_ONE, SEQUENCES, TAUS
from inheritune.analysis.worth import measure_worth
from inheritune.config.source_shape import find_commit
from inheritune.data.batches import Tokens
from inheritune.data.tokenizer_comparison import has_same_ids, open_encoder
from inheritune.errors import UserError
from inheritune.files.markers import check_marked_folder, stamp_weights
from inheritune.models.downloads import download_model
from inheritune.models.gguf_files import convert_gguf, find_gguf
from inheritune.runtime.dist import get_device
from inheritune.runtime.limits import explain_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAP_TOKENS, MAP_SEQUENCES = 40, 3  # the paper's Figures 9 and 12 show 40 tokens, mean of 3 strings


def load_model(model: str, revision: str | None = None, attention: str = "eager") -> "PreTrainedModel":
    """Load a Hugging Face causal LM (folder or Hub id) in fp32, on the GPU if there is one. `attention` is
    the implementation's name in transformers.

    Raises UserError if it cannot be loaded. Code that comes with a model is never run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not Path(model).is_dir() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise UserError(
            f"there is no model folder {model}; give a folder with config.json, or a Hub id such as "
            f"owner/name"
        )
    check_marked_folder(Path(model))
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            model,
            revision=revision or "main",
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    # transformers and torch raise many kinds of errors for: missing, not a causal LM, needs its own code,
    # truncated, unsafe to unpickle
    except Exception as error:
        if explain_limit(error):  # the machine's fault, not the model's
            raise
        raise UserError(
            f"model {model} cannot be loaded as a causal LM: {' '.join(str(error).split())[:300]}"
        ) from None
    loaded, report = found
    if report["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(
            f"model {model} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}; restore the "
            f"checkpoint"
        )
    return loaded.eval().to(get_device())


@contextmanager
def watch_attention(
    model: torch.nn.Module, length: int, measure: Callable[[int, torch.Tensor], object]
) -> Iterator[None]:
    """Call `measure(layer, A_BHTT)` with each layer's attention, in the order of the layers, while the block
    runs.

    A hook on every module takes the (B, H, T, T) map out of the output of the innermost one that returns it.
    So no table of families is needed, and no map outlives its layer (output_attentions would keep all of
    them). Raises UserError if a map is not finite."""
    order: dict[torch.nn.Module, int] = {}

    def hook(module: torch.nn.Module, _: tuple, output: Any) -> tuple | None:
        if not isinstance(output, tuple):
            return None
        for place, value in enumerate(output):
            if not (torch.is_tensor(value) and value.dim() == 4 and value.shape[-2:] == (length, length)):
                continue
            layer = order.get(module, len(order))
            if not torch.isfinite(value).all():
                raise UserError(
                    f"the attention of layer {layer} (from 0) is not finite: the model's weights are damaged"
                )
            if value.min() < 0 or value.triu(1).any():  # keys or values whose head size happens to be T
                continue
            order[module] = layer
            measure(layer, value.detach())
            return (*output[:place], None, *output[place + 1 :])
        return None

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_windows(tokens: Tokens, n_sequences: int, length: int, seed: int) -> torch.Tensor:
    """Read the first `length` tokens of `n_sequences` windows, drawn by `seed` without overlap.  -> (N, T)
    int64

    Raises UserError if the text is too short."""
    available = tokens.n_tokens // length
    if n_sequences < 1 or length < 2:
        raise UserError(f"at least 1 sequence of at least 2 tokens is needed (got {n_sequences} of {length})")
    if n_sequences > available:
        raise UserError(
            f"{n_sequences} sequences of {length} tokens need {n_sequences * length} tokens, but the "
            f"validation text of {tokens.folder} has {tokens.n_tokens}: use --sequences {available} or "
            f"prepare more text"
        )
    starts = np.random.default_rng(seed).choice(available, size=n_sequences, replace=False) * length
    return torch.from_numpy(np.stack([tokens.read_window(int(start), length) for start in starts]))


def measure_model(
    model: str,
    tokens: Tokens,
    n_sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
    maps: list[tuple[int, int]] | None = None,
    batch: int = 20,
    revision: str | None = None,
    progress: bool = False,
    costs: bool = False,
    is_rehearsal: bool = False,
) -> list[dict]:
    """Return the rows of attention.jsonl for `model` (folder, GGUF file or Hub id) on validation `tokens`.

    `maps` lists (layer, head) pairs, from 0, whose mean map is kept for drawing; the default is head 0 at
    four depths. `costs`: measure what each layer is worth on the same windows. Raises UserError if text,
    positions, vocabulary or tokenizer do not fit, or if the model's attention is not available."""
    windows_NT = read_windows(tokens, n_sequences, length, seed)
    loaded = load_model(opened := _convert_if_gguf(model), revision)
    config = loaded.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):
        raise UserError(f"{model} ({config.model_type}) is not a transformer: it has no attention to analyze")
    n_layers, n_heads = config.num_hidden_layers, config.num_attention_heads
    kept_maps = _choose_maps(n_layers) if maps is None else [tuple(pair) for pair in maps]
    _check_fit(model, config, tokens, length, kept_maps)
    if not is_rehearsal:  # where a random model stands for a public one
        _check_tokenizer(model, opened, revision, tokens)
    measured = _measure_windows(loaded, windows_NT, batch, n_layers, kept_maps, progress)
    if len(measured.ranks) != n_layers:
        raise UserError(
            f"{len(measured.ranks)} attention maps came out of the {n_layers} layers of {model} "
            f"({config.model_type}); only models whose every layer has causal softmax attention, returned by "
            f"transformers' eager form, can be analyzed"
        )
    header = {
        "kind": "header",
        "model": str(model),
        "revision": find_commit(model, revision),
        "model_type": config.model_type,
        "layers": n_layers,
        "heads": n_heads,
        "data": tokens.fingerprint,
        "sequences": n_sequences,
        "length": length,
        "seed": seed,
        "taus": list(TAUS),
        "etas": list(ETAS),
        "near_one": NEAR_ONE,
        "files": stamp_weights(model),
        **({} if tokens.first_token is None else {"first_token": tokens.first_token}),
    }
    uniform = measure_uniform(length)
    layers = [measured.layer_row(layer, uniform) for layer in range(n_layers)]
    more: list[dict] = []
    if costs:
        found, more = measure_worth(loaded, windows_NT, batch, layers, progress)
        header |= found
    more += [*measured.map_rows(min(MAP_SEQUENCES, n_sequences)), summarize_model(layers, header.get("loss"))]
    return [header, *layers, *summarize_groups(layers), *more]


def _convert_if_gguf(model: str) -> str:
    """Return the folder that a GGUF file is converted to, and any other model as it is."""
    gguf = find_gguf(Path(model))
    return str(convert_gguf(gguf)) if gguf else model


def _choose_maps(n_layers: int) -> list[tuple[int, ...]]:
    """Return the (layer, head) pairs whose maps are drawn by default."""
    return [(layer, 0) for layer in sorted({n_layers * twelfth // 12 for twelfth in (2, 4, 9, 11)})]


class _Measured:
    """The measures of every layer's maps, and the sums of the maps that are kept, batch by batch."""

    def __init__(self, kept_maps: list[tuple[int, ...]]):
        self.ranks: dict[int, list[torch.Tensor]] = defaultdict(list)  # layer -> one (F, B, H) per batch
        self.masses: dict[int, list[torch.Tensor]] = defaultdict(list)
        # each (T, T), up to MAP_TOKENS
        self.sums = {(layer, head): np.zeros(()) for layer, head in kept_maps}

    def add(self, layer: int, A_BHTT: torch.Tensor, first: int) -> None:
        """Measure the maps of a batch whose first sequence has the index `first`."""
        self.ranks[layer].append(approximate_rank(A_BHTT).cpu())
        self.masses[layer].append(column_mass(A_BHTT).cpu())
        for head in (h for of_layer, h in self.sums if of_layer == layer):
            shown = A_BHTT[: max(0, MAP_SEQUENCES - first), head, :MAP_TOKENS, :MAP_TOKENS]
            self.sums[layer, head] = self.sums[layer, head] + shown.double().sum(dim=0).cpu().numpy()

    def layer_row(self, layer: int, uniform: tuple[int, int]) -> dict:
        ranks_FNH, masses_FNH = (torch.cat(parts[layer], dim=1) for parts in (self.ranks, self.masses))
        return summarize_layer(layer, ranks_FNH.numpy(), masses_FNH.numpy(), uniform)

    def map_rows(self, n_sequences: int) -> list[dict]:
        """Return the rows of the kept maps, each the mean of its first `n_sequences` sequences."""
        return [
            {
                "kind": "map",
                "layer": layer,
                "head": head,
                "sequences": n_sequences,
                "mean": (total / n_sequences).round(4).tolist(),
            }
            for (layer, head), total in self.sums.items()
        ]


def _measure_windows(
    model: "PreTrainedModel",
    windows_NT: torch.Tensor,
    batch: int,
    n_layers: int,
    kept_maps: list[tuple[int, ...]],
    progress: bool,
) -> _Measured:
    """Run the model over the windows, `batch` at a time, and measure every layer's maps."""
    n_sequences, length = windows_NT.shape
    measured = _Measured(kept_maps)
    hidden = None if progress else True  # None: tqdm hides itself where there is no terminal
    bar = tqdm(total=n_layers * n_sequences, desc="attention", unit=" maps", leave=False, disable=hidden)
    first = 0  # of the current batch

    def measure(layer: int, A_BHTT: torch.Tensor) -> None:
        measured.add(layer, A_BHTT, first)
        bar.update(len(A_BHTT))

    with bar, watch_attention(model, length, measure), torch.inference_mode():
        for first in range(0, n_sequences, batch):
            ids_BT = windows_NT[first : first + batch].to(model.device)
            model.base_model(input_ids=ids_BT, use_cache=False)  # without the head: logits are not needed
    return measured


def _check_tokenizer(model: str, opened: str, revision: str | None, tokens: Tokens) -> None:
    """Raise UserError if the data's ids mean other text to the model: what it does with them is noise.

    `opened` is the folder or Hub id that was opened for `model`."""
    folder = Path(opened)
    encode = open_encoder(folder if folder.is_dir() else download_model(opened, revision))
    if encode and not has_same_ids(encode, tokens):
        raise UserError(
            f"the tokenizer of {model} gives other ids than that of the data in {tokens.folder} "
            f"({tokens.manifest['tokenizer']['name']}); prepare an experiment with "
            f"'tokenizer: {model}' under data, and give that"
        )


def _check_fit(model: str, config: Any, tokens: Tokens, length: int, maps: list[tuple[int, ...]]) -> None:
    """Raise UserError unless the model can read such windows of this data and has the heads that `maps` asks
    for."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and length > positions:
        raise UserError(
            f"--length {length} is beyond the {positions} positions of {model}; use --length {positions} or "
            f"less"
        )
    if tokens.vocab_size > config.vocab_size:
        raise UserError(
            f"the data in {tokens.folder} has a vocabulary of {tokens.vocab_size} tokens, {model} knows "
            f"{config.vocab_size}; prepare the text with the model's own tokenizer"
        )
    shape = (config.num_hidden_layers, config.num_attention_heads)
    for pair in maps:
        if len(pair) != 2 or not all(0 <= index < size for index, size in zip(pair, shape, strict=True)):
            raise UserError(
                f"map {pair} is not a (layer, head) of {model}, which has {shape[0]} layers of {shape[1]} "
                f"heads, from 0"
            )
