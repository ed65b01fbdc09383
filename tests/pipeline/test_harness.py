"""Tasks of lm-evaluation-harness through engines of ours: the same answers as the harness gives by itself."""

import json

import pytest

import poise
from poise.checkpoints import open_checkpoint
from poise.core.errors import UsageError
from poise.engines.torch import Torch
from poise.pipeline.cache import Cache
from poise.pipeline.candidates import Tasks
from poise.pipeline.harness import run_tasks
from poise.pipeline.progress import silent
from poise.pipeline.scoring import Lazy

pytest.importorskip("lm_eval")
CHOICE = """task: cats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN = """task: wrote
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_factory):
    """Definitions and items; the model's own answer is wanted in every other line."""
    path = tmp_path_factory.mktemp("tasks")
    lines = [
        {
            "question": f"the cat sat on {n} and then",
            "choices": ["the mat", "cat", "it sat there too"],
            "answer": n % 3,
        }
        for n in range(12)
    ]
    with Torch() as engine:
        checkpoint = open_checkpoint(model_factory("llama", "bfloat16"))
        engine.load(checkpoint)
        tokenizer = checkpoint.tokenizer()
        for n, line in enumerate(lines):
            made = engine.generate(
                tokenizer(line["question"])["input_ids"], 6, {tokenizer.eos_token_id}
            ).tokens
            said = tokenizer.decode(made).split(".")[0]
            line["target"] = said if n % 2 else "nothing of the kind"
    (path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "cats.yaml").write_text(CHOICE.format(file=path / "items.jsonl"))
    (path / "wrote.yaml").write_text(WRITTEN.format(file=path / "items.jsonl"))
    return path


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def ours(model, folder, names, cache=None):
    checkpoint = open_checkpoint(model)

    def start():
        engine = Torch()
        engine.load(checkpoint)
        return engine

    facts = {"limit": None, "folder": folder, "context": 128, "progress": silent}
    return run_tasks(Lazy(start), checkpoint.tokenizer(), names, cache=cache or Cache(None, {}), **facts)


def test_every_item_is_what_the_harness_says_by_itself(llama, folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["cats", "wrote"]
    harness = HFLM(pretrained=str(llama), dtype="float32", device="cpu", batch_size=1)
    manager = TaskManager(include_path=str(folder))
    done = simple_evaluate(model=harness, tasks=names, task_manager=manager, bootstrap_iters=0)
    found = ours(llama, folder, names)
    assert set(found) == {"cats acc", "cats acc_norm", "wrote exact_match"}
    for key, items in found.items():
        task, metric = key.split()
        expected = {str(item["doc_id"]): item[metric] for item in done["samples"][task] if metric in item}
        assert items == expected
        assert 0 < sum(items.values()) < len(items)
        shown = done["results"][task][f"{metric},none"]
        assert sum(items.values()) / len(items) == pytest.approx(shown)


def test_what_is_answered_is_not_asked_again(llama, folder, monkeypatch):
    cache = Cache(None, {})
    first = ours(llama, folder, ["cats", "wrote"], cache)
    monkeypatch.setattr(Torch, "load", lambda *_: pytest.fail("loads a model"))
    assert ours(llama, folder, ["cats", "wrote"], cache) == first


def test_unknown_tasks_are_named(llama, folder):
    with pytest.raises(UsageError, match="no task dogs"):
        ours(llama, folder, ["dogs"])


def test_a_comparison_counts_flips_of_tasks(llama, folder):
    tasks = Tasks(names=("cats",), folder=folder)
    (row,) = poise.compare(llama, [llama], windows=2, tasks=tasks).rows
    names = {finding.name for finding in row.findings}
    assert {"cats_acc_change", "cats_acc_norm_change"} <= names
    assert row.value("cats_acc_flips") == 0
    assert row.value("cats_acc_recovery") == 100.0
    assert row.value("cats_acc") == pytest.approx(
        sum(ours(llama, folder, ["cats"])["cats acc"].values()) / 12
    )
