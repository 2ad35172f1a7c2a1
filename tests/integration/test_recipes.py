"""The shipped experiments against the paper: sizes, stages, batches and tokens of every run, and their
rehearsals.

The right-hand sides are written out from the paper (Algorithm 1, its tables, version 1), not read from the
experiments.
"""

import csv
import re

import pytest
import torch
import yaml

from inheritune.config.experiment import load_experiment
from inheritune.config.layers import parse_layers
from inheritune.config.paths import RECIPES, REPOSITORY
from inheritune.data.gpt2_tokenizer import GPT2_SIZE
from inheritune.data.tokenizer import check_vocabulary
from inheritune.engines.deepspeed_json import load_deepspeed_json
from inheritune.models.networks import build_config, build_model, count_parameters
from inheritune.models.surgery import cut_config, halve_config
from inheritune.planning.plan import plan_experiment

# experiment: (row of table_model_configs.csv, batch in tokens, steps, first learning rate)
TRAINED = {
    "gpt2_small_owt": ("GPT-2 Small", 393_216, 100_000, 6e-4),  # the paper gives only the steps
    "gpt2_medium_owt": ("GPT-2 Medium", 393_216, 100_000, 3e-4),
    "gpt2_large_owt": ("GPT-2 Large", 131_072, 100_000, 2e-4),
    "gpt2_xl_owt": ("GPT-2 XLarge", 131_072, 100_000, 1.5e-4),
    "gpt2_medium_fineweb": ("GPT-2 Medium", 61_440, 100_000, 3e-4),
    "gpt2_large_fineweb": ("GPT-2 Large-dagger", 61_440, 100_000, 2e-4),
    "openllama_3b_1b": (None, 131_072, 60_000, 3e-4),  # 64K steps would be 8.4 epochs
    "openllama_7b": (None, 131_072, 381_400, 3e-4),  # 191K steps would be 25B tokens
    "llama2_7b": (None, 131_072, 381_400, 3e-4),
}
# the paper's rounds; where ours has more, they come after these, for a run that is not at parity yet
ROUNDS = {
    "gpt2_small_owt": [4],
    "gpt2_medium_owt": [12, 14, 16],
    "gpt2_large_owt": [18],
    "gpt2_xl_owt": [24],
    "gpt2_medium_fineweb": [16],
    "gpt2_large_fineweb": [16],
}
LLAMA_BILLIONS = {  # version 1 of the paper: (reference, inherited), embeddings and head counted
    "openllama_3b_1b": (3.426, 1.816),
    "openllama_7b": (6.738, 1.476),
    "llama2_7b": (6.738, 1.679),
}
CHOSEN = {"gpt2_small_owt": {6, 8}, "gpt2_large_owt": {20, 22}, "gpt2_xl_owt": {26, 28}} | dict.fromkeys(
    ("gpt2_medium_fineweb", "gpt2_large_fineweb"), {18, 20}
)
"""Depths that are ours, for growth beyond the paper's rounds."""
HALVES_OF_25_HEADS = {(48, 768)}
"""Half of XL: the CSV counts 800 wide, which 12.5 heads would be; ours has 12 heads of 64."""


def test_every_experiment_of_the_paper_is_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*TRAINED, "quickstart"}


def paper(name: str) -> list[dict]:
    """Rows of a table in recipes/paper/."""
    with open(RECIPES / "paper" / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def paper_parameters() -> dict[tuple[str, int, int], int]:
    """{(family, layers, width): parameters} of recipes/paper/table_model_configs.csv."""
    keyed = {
        (row["model_family"], int(row["layers"]), int(row["hidden_size"])): row
        for row in paper("table_model_configs.csv")
    }
    return {key: int(row["params_computed_tied_no_bias"]) for key, row in keyed.items()}


def depths(experiment, name: str) -> list[int]:
    """Layers of each model that a run makes: one, or one per stage."""
    run = experiment.runs[name]
    return (
        run.grow.depths(run.init.inherit.layers, experiment.model.layers)
        if run.grow
        else [experiment.layers_of(run)]
    )


def configs(experiment) -> dict[str, list]:
    """{run: configuration of each model it makes}; of others' models only the experiment's reference."""
    found = {}
    for name, run in experiment.runs.items():
        if name == "reference" or not run.init.external:
            whole = [build_config(experiment.model, layers) for layers in depths(experiment, name)]
            found[name] = [halve_config(config) for config in whole] if run.init.half_width else whole
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_every_run_builds_at_full_size_with_the_papers_parameter_count(name):
    experiment, family, published = load_experiment(name), TRAINED[name][0], paper_parameters()
    counts = {}
    for config in (config for of_run in configs(experiment).values() for config in of_run):
        size = config.num_hidden_layers, config.hidden_size
        if size not in counts:
            with torch.device("meta"):
                model = build_model(config)
            assert config.num_hidden_layers == len(model.base_model.h if family else model.base_model.layers)
            counts[size] = count_parameters(config)
    if family is None:
        full, inherited = LLAMA_BILLIONS[name]
        by_depth = {layers: count for (layers, _), count in counts.items()}
        deepest, main = experiment.model.layers, depths(experiment, next(iter(experiment.runs)))[0]
        assert (round(by_depth[deepest] / 1e9, 3), round(by_depth[main] / 1e9, 3)) == (full, inherited)
        block = (by_depth[deepest] - by_depth[main]) // (deepest - main)
        assert all(
            count == by_depth[deepest] - (deepest - layers) * block for layers, count in by_depth.items()
        )
        return
    known = {size: published.get((family, *size)) for size in counts}
    ours = {(layers, experiment.model.width) for layers in CHOSEN.get(name, ())} | HALVES_OF_25_HEADS
    assert {size for size, count in known.items() if count is None} <= ours
    assert {size: counts[size] for size, count in known.items() if count} == {
        n: c for n, c in known.items() if c
    }
    assert (
        known[experiment.model.layers, experiment.model.width]
        and known[ROUNDS[name][-1], experiment.model.width]
    )


@pytest.mark.parametrize("name", TRAINED)
def test_batch_steps_and_rate_are_the_papers(name):
    experiment, (_, batch, steps, lr) = load_experiment(name), TRAINED[name]
    train = experiment.train
    assert (train.batch_tokens, train.steps, train.lr, train.min_lr) == (batch, steps, lr, 1e-5)
    assert train.betas == ((0.9, 0.999) if "fineweb" in name else (0.9, 0.95))
    assert (train.weight_decay, train.clip, train.schedule) == (0.1, 1.0, "cosine")
    assert train.warmup_steps == (2000 if name.startswith("gpt2") else 1000)
    assert train.precision == "bf16_autocast" and load_deepspeed_json(train.deepspeed)
    changed = {run: spec.train for run, spec in experiment.runs.items() if spec.train and run not in CONTROLS}
    if name.endswith("_owt"):
        small = ROUNDS[name][-1]
        expected = {f"random_{small}_200k": {"steps": 200_000}}
        assert changed == expected | (MEDIUM_CHANGES if name == "gpt2_medium_owt" else {})
        assert experiment.runs[f"random_{small}"].layers == small


CONTROLS = (
    "reference_longer",
    "random_longer",
    "distilled",
    "influence",
    "reference_clip",
    "inheritune_clip",
)
CONTROLS += ("reference_394k", "inheritune_394k")
"""Runs that the paper does not have."""
MEDIUM_CHANGES = {
    **dict.fromkeys(("kd_random", "kd_teacher", "kd_teacher_12"), {"steps": 50_000, "min_lr": 3e-5}),
    **dict.fromkeys(
        ("reference_200k_50k", "inheritune_18_200k_50k"), {"steps": 200_000, "batch_tokens": 49_152}
    ),
    "lazy_deep_24": {"batch_tokens": 49_152},
}


@pytest.mark.parametrize("size", ["Medium", "Large", "XLarge"])
def test_hyperparameters_are_those_of_the_papers_list(size):
    said = {
        row["setting"]: row["value"]
        for row in paper("hyperparameters.csv")
        if row["experiment"] == f"GPT-2 {size} and variants"
    }
    train = load_experiment(f"gpt2_{size.lower().replace('xlarge', 'xl')}_owt").train
    # 394K: thousands, 128K: 1024s
    assert abs(train.batch_tokens / (1024 * int(said["batch_size"].split("K")[0])) - 1) < 0.03
    if "tokens_total" in said:
        assert f"({train.batch_tokens:,} x 100K)" in said["tokens_total"]
    assert train.lr == float(said["learning_rate_max"]) and said["lr_schedule"] == f"{train.schedule} to 1e-5"
    for key, value in (
        ("warmup_steps", train.warmup_steps),
        ("total_steps", train.steps),
        ("weight_decay", train.weight_decay),
        ("grad_clip", train.clip),
        ("beta1", train.betas[0]),
        ("beta2", train.betas[1]),
    ):
        assert float(said[key]) == value, key


def test_distillation_is_that_of_the_papers_list():
    said = {
        r["setting"]: r["value"]
        for r in paper("hyperparameters.csv")
        if r["experiment"] == "knowledge distillation baselines"
    }
    experiment = load_experiment("gpt2_medium_owt")
    for name in ("kd_random", "kd_teacher", "kd_teacher_12"):
        run, train = experiment.runs[name], experiment.train_of(experiment.runs[name])
        assert run.distil.teacher == "reference" and experiment.reference_of(run) == "reference"
        assert (run.distil.alpha, run.distil.temperature) == (
            float(said["alpha"]),
            float(said["softmax_temperature"]),
        )
        assert train.steps == int(said["total_steps"]) and said["lr_schedule"] == "cosine to 1/10 of max"
        assert train.min_lr == pytest.approx(train.lr / 10) and train.lr == float(said["learning_rate_max"])


def test_every_published_run_has_its_depth_and_steps_here():
    """The authors' logs that belong to a run of ours (curves.yaml), and that none of their logs is left
    out."""
    index = {row["run"]: row for row in paper("runs_reference_index.csv")}
    assert index.keys() == {row["run"] for row in paper("curves_reference_val_loss.csv")}
    used = set()
    for name, runs in yaml.safe_load((RECIPES / "paper" / "curves.yaml").read_text(encoding="utf-8")).items():
        experiment = load_experiment(name)
        for run, curves in runs.items():
            spec = experiment.runs[run]
            for layers, curve in (
                curves if isinstance(curves, dict) else {experiment.layers_of(spec): curves}
            ).items():
                assert int(index[curve]["layers"]) == layers and layers in depths(experiment, run), (
                    name,
                    run,
                )
                assert int(index[curve]["total_steps"]) == experiment.train_of(spec).steps, (name, run)
                used.add(curve)
    assert set(index) == used


WHOLE_BLOCKS = ["attn", "mlp", "norms"]
PLACES = {  # (experiment, run): blocks of the source, None for a random one
    ("gpt2_medium_owt", "stacking"): [*range(8)] * 2,
    ("gpt2_medium_owt", "hybrid"): [*range(8)] * 2,
    ("gpt2_medium_owt", "kd_teacher"): [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 18, 19, 20, 21],
    ("gpt2_medium_owt", "kd_teacher_12"): [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22],
    ("gpt2_medium_owt", "lazy_12"): [*range(12, 24)],
    ("gpt2_medium_owt", "lazy_deep_24"): [None] * 15 + [*range(15, 24)],
    ("gpt2_medium_owt", "inheritune_18_200k_50k"): [*range(18)],
    ("gpt2_large_owt", "stacking"): [*range(9)] * 2,
    ("gpt2_large_owt", "hybrid"): [*range(9)] * 2,
    ("gpt2_large_owt", "lazy_18"): [*range(18, 36)],
    ("gpt2_xl_owt", "stacking"): [*range(12)] * 2,
    ("gpt2_xl_owt", "hybrid"): [*range(12)] * 2,
    ("gpt2_small_owt", "layers_5_to_8"): [4, 5, 6, 7],
    ("gpt2_small_owt", "layers_9_to_12"): [8, 9, 10, 11],
}


@pytest.mark.parametrize("name, run", PLACES)
def test_baselines_copy_the_blocks_that_the_paper_says(name, run):
    experiment = load_experiment(name)
    start, source = experiment.runs[run].init.copied, "stacking_half" if run == "stacking" else "reference"
    source = "reference_200k_50k" if "200k" in run else source
    assert start.source == source
    assert start.blocks(experiment.layers_of(experiment.runs[source])) == PLACES[name, run]
    assert len(start.parts) == (5 if run == "stacking" else 3)


def test_submodule_runs_copy_what_table_3_says():
    runs = load_experiment("gpt2_medium_owt").runs
    modules = {name: run.init.inherit.modules for name, run in runs.items() if run.init.inherit}
    assert {name: chosen for name, chosen in modules.items() if chosen != WHOLE_BLOCKS} == {
        "submodules_attn": ["attn", "attn_norm"],
        "submodules_mlp": ["mlp", "mlp_norm"],
        "submodules_no_norms": ["attn", "mlp"],
    }
    assert runs["inheritune_previous"].grow.from_ == "previous"


@pytest.mark.parametrize("name", ROUNDS)
def test_stages_begin_with_the_papers_rounds(name):
    experiment, rounds = load_experiment(name), ROUNDS[name]
    assert experiment.runs["reference"].init.random and depths(experiment, "reference") == [
        experiment.model.layers
    ]
    for run, parts in (("inheritune", 3), ("inheritune_everything", 5)):
        assert depths(experiment, run)[: len(rounds)] == rounds
        assert set(depths(experiment, run)[len(rounds) :]) == CHOSEN.get(name, set())
        assert (
            len(experiment.runs[run].init.inherit.parts) == parts
            and experiment.runs[run].grow.from_ == "reference"
        )
        assert experiment.reference_of(experiment.runs[run]) == "reference"


@pytest.mark.parametrize("name", ROUNDS)
def test_every_claim_has_its_controls(name):
    """The reference trained on, random at the FLOPs of reference and Inheritune, distilled, chosen layers."""
    experiment, small = load_experiment(name), ROUNDS[name][-1]
    runs, full = experiment.runs, experiment.model.layers
    longer = runs["reference_longer"].init.inherit
    assert longer.source == "reference" and longer.blocks(full) == [*range(full)] and len(longer.parts) == 5
    assert experiment.train_of(runs["reference_longer"]) == experiment.train
    first = runs["inheritune"].init.inherit.model_copy(update={"layers": f"0:{small}"})
    assert runs["distilled"].init.inherit == first and runs["distilled"].distil.teacher == "reference"
    assert runs["influence"].init.inherit == first.model_copy(update={"layers": f"auto:{small}:influence"})
    flops = {facts["run"]: facts["flops"] for facts in plan_experiment(experiment) if not facts["stage"]}
    sources = [source for source, _ in runs["random_longer"].sources()]
    assert sources == (
        ["random_16"] if "fineweb" in name else []
    )  # whose text ends before so long a schedule
    spent = flops["random_longer"] + sum(flops[source] for source in sources)
    wanted = flops["reference"] + flops["influence"]
    assert spent / wanted == pytest.approx(0.91 if name == "gpt2_large_fineweb" else 1.0, abs=0.004)
    assert experiment.reference_of(runs["random_longer"]) == "reference"
    assert experiment.layers_of(runs["random_longer"]) == small == experiment.layers_of(runs["influence"])
    shown = {row.run for row in experiment.paper}
    assert set(CONTROLS) & set(runs) <= shown


CLIPS = {"gpt2_large_owt": 1 / 64, "gpt2_xl_owt": 1 / 64, "gpt2_small_owt": 1 / 8, "gpt2_medium_owt": 1 / 8}


@pytest.mark.parametrize("name", ROUNDS)
def test_the_authors_clip_and_batch_have_a_reference_and_a_cut_of_it(name):
    experiment = load_experiment(name)
    variants = {"clip": {"clip": CLIPS.get(name, 1 / 10)}}  # the FineWeb code adds up 10 micro-batches
    if name == "gpt2_large_owt":
        variants["394k"] = {"batch_tokens": 393_216}
    for ending, train in variants.items():
        full, cut = (experiment.runs[f"{run}_{ending}"] for run in ("reference", "inheritune"))
        assert full.train == cut.train == train and full.init.random and full.compare == "reference"
        assert experiment.layers_of(full) == experiment.model.layers
        start = experiment.runs["distilled"].init.inherit
        assert cut.init.inherit == start.model_copy(update={"source": f"reference_{ending}"})
        assert experiment.reference_of(cut) == f"reference_{ending}"


def test_the_low_data_controls_have_one_epoch():
    experiment = load_experiment("openllama_3b_1b")
    thirteen = experiment.runs["one_epoch"].init.inherit
    for run, layers in (("reference_longer", 26), ("random_13", 13), ("distilled", 13), ("influence", 13)):
        spec = experiment.runs[run]
        assert experiment.layers_of(spec) == layers and spec.train == {"steps": 7_500}
        assert spec.init.random or spec.init.inherit.source == thirteen.source
    assert len(experiment.runs["reference_longer"].init.inherit.parts) == 5
    assert experiment.runs["distilled"].distil.teacher == thirteen.source


def test_a_public_start_needs_no_trained_reference():
    experiment = load_experiment("gpt2_xl_owt")
    run = experiment.runs["inheritune_public"]
    assert run.init.inherit.source == "openai-community/gpt2-xl" and not run.grow
    # OpenAI's config.json: 50257 tokens, trained biases, standard scaling; what is cut from it stays so, and
    # our tokens fit
    public = build_config(experiment.model)
    public.vocab_size, public.frozen_zero_biases, public.scale_attn_by_inverse_layer_idx = (
        GPT2_SIZE,
        False,
        False,
    )
    assert count_parameters(public) == 1_557_611_200
    config = cut_config(public, parse_layers(run.init.inherit.layers, 48))
    assert (config.vocab_size, config.num_hidden_layers, config.scale_attn_by_inverse_layer_idx) == (
        50257,
        24,
        False,
    )
    check_vocabulary(GPT2_SIZE, config.vocab_size, "the public model")


def test_low_data_runs_count_their_tokens():
    experiment = load_experiment("openllama_3b_1b")
    tokens = {
        name: experiment.train_of(run).steps * experiment.train_of(run).batch_tokens
        for name, run in experiment.runs.items()
    }
    train_tokens = 1_000_000_000 * (1 - 0.005)
    assert tokens["eight_epochs"] == 8 * tokens["one_epoch"] and 0.98 < tokens["one_epoch"] / train_tokens < 1
    released = experiment.train_of(experiment.runs["released_391m"])
    # the paper: 391M tokens
    assert tokens["released_391m"] == 191_000 * 2048 and released.batch_tokens == 8 * 2048
    assert (released.schedule, released.weight_decay, released.clip, released.betas) == (
        "constant",
        0.01,
        0,
        (0.9, 0.999),
    )
    assert depths(experiment, "eight_epochs") == [13]
    for epochs in (2, 3, 5, 10, 20):
        assert tokens[f"epochs_{epochs}"] == epochs * tokens["one_epoch"] and depths(
            experiment, f"epochs_{epochs}"
        ) == [13]
        assert tokens[f"epochs_{epochs}"] <= int(experiment.data.sampling.partition(":")[2]) * train_tokens
    for layers in (4, 6, 8, 10, 16, 18, 20):
        assert tokens[f"n_{layers}"] == tokens["one_epoch"] and depths(experiment, f"n_{layers}") == [layers]


@pytest.mark.parametrize("name", ["openllama_7b", "llama2_7b"])
def test_fresh_tokens_are_kept_at_every_ten_billion(name):
    experiment = load_experiment(name)
    run, batch = experiment.runs["inheritune"], experiment.train.batch_tokens
    assert [round(step * batch / 1e9, 1) for step in run.keep_at] == [10, 20, 30, 40, 50]
    windows = (
        experiment.data.max_tokens - experiment.data.shard_tokens - 1
    ) // experiment.data.sequence_length
    assert experiment.train.steps * batch // experiment.data.sequence_length <= windows
    # the embedding that is inherited belongs to this tokenizer
    assert experiment.data.tokenizer.rpartition("/")[0] == run.init.inherit.source
    assert experiment.data.tokenizer_revision == run.init.inherit.revision


@pytest.mark.parametrize("name", [n for n in TRAINED if "fineweb" in n])
def test_one_pass_has_enough_tokens(name):
    experiment = load_experiment(name)
    for run in experiment.runs.values():
        train = experiment.train_of(run)
        assert train.steps * train.batch_tokens < experiment.data.max_tokens - experiment.data.shard_tokens


@pytest.mark.parametrize("name", TRAINED)
def test_rehearsal_keeps_the_growth_and_the_kept_steps(name):
    small, whole = load_experiment(name, rehearse=True), load_experiment(name)
    made = configs(small)
    for run, spec in small.runs.items():
        with torch.device("meta"):
            build_model(made.get(run, made["reference"])[-1])
        assert not spec.grow or len(depths(small, run)) >= 2
        assert len(spec.keep_at) == len(whole.runs[run].keep_at)
        assert spec.distil == whole.runs[run].distil
        if spec.init.stack:  # half of the blocks, twice
            blocks = spec.init.stack.blocks(small.model.layers)
            assert blocks[: len(blocks) // 2] == blocks[len(blocks) // 2 :]


def test_licences_of_all_that_shipped_experiments_start_from_are_known():
    licences = yaml.safe_load(
        (REPOSITORY / "inheritune" / "evaluation" / "licences.yaml").read_text(encoding="utf-8")
    )
    names = [
        path.relative_to(RECIPES).with_suffix("")
        for path in (*RECIPES.glob("*.yaml"), *RECIPES.glob("attention/*.yaml"))
    ]
    experiments = [load_experiment(str(name)) for name in names]
    models = {
        source
        for e in experiments
        for run in e.runs.values()
        for source, _ in run.sources()
        if source not in e.runs
    }
    assert "facebook/opt-1.3b" in models and models <= set(licences["models"])
    assert {e.data.repo or e.data.source for e in experiments} <= set(licences["data"])


@pytest.mark.parametrize("name", TRAINED)
def test_everything_from_the_hub_is_pinned_to_a_commit(name):
    experiment = load_experiment(name)
    pins = [experiment.data.revision] + [experiment.data.tokenizer_revision] * (
        experiment.data.tokenizer != "gpt2"
    )
    for run in experiment.runs.values():
        pins += [revision for source, revision in run.sources() if source not in experiment.runs]
    assert all(re.fullmatch("[0-9a-f]{40}", pin or "") for pin in pins), pins


def test_the_readme_lists_every_experiment_with_its_steps_and_batch():
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.yaml\) \|.*\| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    listed = {
        name: (int(steps.replace(",", "")), int(batch.replace(",", "")))
        for name, file, steps, batch in rows
        if name == file
    }
    experiments = {path.stem: load_experiment(path.stem).train for path in RECIPES.glob("*.yaml")}
    assert listed == {name: (train.steps, train.batch_tokens) for name, train in experiments.items()}
