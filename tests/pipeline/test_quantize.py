"""The main job: deterministic, resumable at any point, and nothing half-done is left as an output."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import poise
from poise.checkpoints import open_checkpoint
from poise.core.artifact import Artifact
from poise.core.errors import ExportError, FormatError, PoiseError, UsageError
from poise.core.plan import Option, Plan, Recipe, Rule
from poise.core.registry import names
from poise.planning.grid import EXAMPLES
from poise.planning.presets import preset_recipe


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_the_record_says_where_time_went(llama, tmp_path):
    poise.quantize(llama, "mobile", tmp_path / "out", to=["gguf", "compressed-tensors"])
    for name in ("gguf", "compressed-tensors"):
        record = json.loads((tmp_path / "out" / f"{name}.run.json").read_text())
        assert set(record["stages"]) == {"calibrate", "solve", "export"}
        assert min(record["stages"].values()) > 0
        assert sum(record["stages"].values()) <= record["wall_seconds"] + 0.01
        assert record["peak_memory"] > 1 << 20


@pytest.mark.parametrize("exporter", names("exporter"))
@pytest.mark.parametrize("recipe", ["mobile", "edge", "layer-types", "original"])
def test_shipped_recipes_make_whole_artifacts(llama, tmp_path, exporter, recipe):
    (artifact,) = poise.quantize(llama, recipe, tmp_path / "out", to=exporter)
    again = Artifact.open(tmp_path / "out")
    assert again.manifest == artifact.manifest
    assert again.damaged() == []
    assert {row.name for row in again.plan.rows} == {
        linear.name for linear in open_checkpoint(llama).linears()
    }
    assert not (tmp_path / "out.partial").exists()
    stored = open_checkpoint(artifact.model)
    assert artifact.manifest.bits_per_weight == pytest.approx(
        8 * stored.total_bytes / artifact.manifest.weights
    )
    assert "base_model_relation: quantized" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("exporter", names("exporter"))
def test_equal_runs_give_equal_bytes(llama, tmp_path, exporter):
    for name in ("first", "second"):
        poise.quantize(llama, "mobile", tmp_path / name, to=exporter)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_several_exporters_share_one_run(llama, tmp_path):
    made = poise.quantize(llama, "mobile", tmp_path / "out", to=["gguf", "compressed-tensors"])
    assert [artifact.path.name for artifact in made] == ["gguf", "compressed-tensors"]
    poise.quantize(llama, "mobile", tmp_path / "alone", to="gguf")
    both, alone = contents(tmp_path / "out" / "gguf"), contents(tmp_path / "alone")
    assert both["model.gguf"] == alone["model.gguf"]


KILLED = """
import sys, time
import poise
from poise.core.solver import Solver
whole = Solver.solve
def slow(self, *args, **kwargs):
    time.sleep(0.05)
    return whole(self, *args, **kwargs)
Solver.solve = slow
print("go", flush=True)
poise.quantize(sys.argv[1], "mobile", sys.argv[2], to=sys.argv[3], resume=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("exporter", names("exporter"))
def test_killed_at_random_points_then_resumed_gives_equal_bytes(llama, tmp_path, exporter):
    poise.quantize(llama, "mobile", tmp_path / "whole", to=exporter)
    dice, out, kills = random.Random(7), tmp_path / "out", 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(llama), str(out), exporter],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout.readline() == "go\n"
        time.sleep(0.4 + 1.6 * dice.random())
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills
    poise.quantize(llama, "mobile", out, to=exporter, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_resumed_run_does_not_solve_again(llama, tmp_path, monkeypatch):
    from poise.core.solver import Solver
    from poise.solvers.rtn import Rtn

    solved, whole = [], Solver.solve

    def interrupted(self, *args, name, **kwargs):
        if isinstance(self, Rtn):  # what results are compared with
            return whole(self, *args, name=name, **kwargs)
        if len(solved) == 5:
            raise KeyboardInterrupt
        solved.append(name)
        return whole(self, *args, name=name, **kwargs)

    monkeypatch.setattr(Solver, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        poise.quantize(llama, "mobile", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first = list(solved)
    solved.clear()
    before = [
        json.loads(line)
        for line in (tmp_path / "out.partial" / "seconds.jsonl").read_text().split("\n")
        if line
    ]
    assert before[-1].keys() == {"solve"}

    def noting(self, *args, name, **kwargs):
        if not isinstance(self, Rtn):
            solved.append(name)
        return whole(self, *args, name=name, **kwargs)

    monkeypatch.setattr(Solver, "solve", noting)
    poise.quantize(llama, "mobile", tmp_path / "out", resume=True)
    assert not set(first) & set(solved)
    record = json.loads((tmp_path / "out.run.json").read_text())
    assert record["stages"]["solve"] > before[-1]["solve"]
    assert record["stages"]["solve"] < before[-1]["solve"] + record["wall_seconds"]


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(llama, tmp_path):
    code = KILLED.replace(
        "poise.quantize(sys.argv[1]",
        'from poise.cli import main; sys.argv[1:] = ["quantize", sys.argv[1], "-o", sys.argv[2]]; main()\n#',
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(llama), str(tmp_path / "out"), "gguf"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    deadline = time.time() + 60
    while not list(tmp_path.glob("out.partial/codes/*")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume continues" in message
    assert not (tmp_path / "out").exists()
    poise.quantize(llama, "mobile", tmp_path / "out", resume=True)


def test_an_existing_output_is_refused_and_force_replaces_it(llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists; choose another folder, or --force"):
        poise.quantize(llama, "mobile", out)
    assert (out / "precious.txt").read_text() == "mine"
    poise.quantize(llama, "mobile", out, force=True)
    assert not (out / "precious.txt").exists()
    assert Artifact.open(out).damaged() == []


def test_an_unfinished_run_asks_what_to_do(llama, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "key.json").write_text('{"plan": "another"}')
    with pytest.raises(UsageError, match="unfinished run: --resume continues"):
        poise.quantize(llama, "mobile", tmp_path / "out")
    with pytest.raises(UsageError, match=r"of another run \(calibration, plan, poise, source changed\)"):
        poise.quantize(llama, "mobile", tmp_path / "out", resume=True)
    poise.quantize(llama, "mobile", tmp_path / "out", force=True)


def test_a_full_disk_is_told_before_and_during(llama, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage(10, 10, 0))
        with pytest.raises(PoiseError, match=r"needs about .* GB while it is made, 0\.0 GB are free"):
            poise.quantize(llama, "mobile", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr("poise.pipeline.workspace.save_file", full)
        with pytest.raises(PoiseError, match=r"is full; free some and --resume"):
            poise.quantize(llama, "mobile", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    poise.quantize(llama, "mobile", tmp_path / "out", resume=True)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a small file system")
def test_a_file_size_limit_stops_the_run_without_an_output(llama, tmp_path):
    """The kernel itself refuses to write: what is left is resumable, not an artifact."""
    code = (
        "import resource, signal, sys, poise\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        "poise.quantize(sys.argv[1], 'original', sys.argv[2], to='compressed-tensors')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert not (tmp_path / "out").exists()


def test_a_damaged_weight_is_named(llama, copy_of, tmp_path):
    folder = copy_of(llama)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        poise.quantize(folder, "mobile", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_read_back_must_be_what_was_meant(llama, tmp_path, monkeypatch):
    from poise.checkpoints.huggingface import HuggingFaceCheckpoint

    whole = HuggingFaceCheckpoint.read_rows

    def flipped(self, linear, rows):
        tensor = whole(self, linear, rows)
        if linear.name == "model.layers.0.self_attn.v_proj.weight":
            tensor = tensor.clone()
            tensor[5, 7] += 1
        return tensor

    monkeypatch.setattr(HuggingFaceCheckpoint, "read_rows", flipped)
    with pytest.raises(ExportError, match=r"layers\.0\.self_attn\.v_proj\.weight: .*not what was meant"):
        poise.quantize(llama, "cloud", tmp_path / "out", to="compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_a_plan_can_be_edited_and_run(llama, tmp_path):
    (artifact,) = poise.quantize(llama, "mobile", tmp_path / "first")
    text = (tmp_path / "first" / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace("int(bits=4, group=32", "int(bits=5, group=32"))
    (edited,) = poise.quantize(llama, tmp_path / "plan.json", tmp_path / "second")
    assert edited.manifest.linear_bits_per_weight > artifact.manifest.linear_bits_per_weight
    with pytest.raises(UsageError, match="the plan is for gguf, not for compressed-tensors"):
        poise.quantize(llama, tmp_path / "plan.json", tmp_path / "third", to="compressed-tensors")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match=r"bad\.json: not a plan"):
        poise.quantize(llama, tmp_path / "bad.json", tmp_path / "fourth")


def test_dry_run_does_nothing_and_predicts_the_size(llama, tmp_path):
    from poise.pipeline import dry_run

    before = set(tmp_path.iterdir())
    (estimate,) = dry_run(llama, "mobile", tmp_path / "out")
    assert set(tmp_path.iterdir()) == before
    (artifact,) = poise.quantize(llama, "mobile", tmp_path / "out")
    assert estimate.artifact_bytes == pytest.approx(artifact.manifest.weight_bytes, rel=0.02)
    assert estimate.plan == artifact.plan


def test_dry_run_counts_training(llama, tmp_path):
    from poise.pipeline import dry_run

    text = tmp_path / "text.txt"
    text.write_text("some words " * 40_000)

    def told(preset):
        recipe = preset_recipe(preset, 4, 32, quick=False)
        (found,) = dry_run(llama, recipe, tmp_path / "out", to="compressed-tensors", calibration=text)
        return found

    balanced, best = told("balanced"), told("best")
    assert best.seconds > balanced.seconds
    assert best.memory > balanced.memory
    assert best.disk > balanced.disk
    assert not list(tmp_path.glob("out*"))


FORMATS = [spec for name in names("format") for spec in EXAMPLES.get(name, (name,))]


@pytest.mark.parametrize("exporter", names("exporter"))
@pytest.mark.parametrize("solver", names("solver"))
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_solver_and_exporter_work_together(llama, tmp_path, format, solver, exporter):
    """Either the exporter refuses with a reason, or what it wrote decodes to what was meant."""
    recipe = Recipe(
        name="t", description="", rules=(Rule(role="ffn.*", options=(Option(format=format),), solver=solver),)
    )
    (artifact,) = poise.quantize(llama, recipe, tmp_path / "out", to=exporter)
    rows = [row for row in artifact.plan.rows if row.role.startswith("ffn")]
    assert all((row.kept and len(row.reason) > 10) or row.solver == solver for row in rows)


def test_moe_and_transposed_models_go_through(model_factory, tmp_path):
    for name, exporter in (("mixtral", "gguf"), ("qwen3_moe", "compressed-tensors"), ("gpt2", "gguf")):
        (artifact,) = poise.quantize(model_factory(name, "bfloat16"), "mobile", tmp_path / name, to=exporter)
        assert artifact.manifest.linear_bits_per_weight < 9


def test_conv1d_is_kept_where_the_container_cannot_hold_it(model_factory, tmp_path):
    (artifact,) = poise.quantize(model_factory("gpt2"), "mobile", tmp_path / "out", to="compressed-tensors")
    inside = [row for row in artifact.plan.rows if row.role.startswith(("attention", "ffn"))]
    assert inside
    assert all(row.kept and "Conv1D" in row.reason for row in inside)
    assert isinstance(artifact.plan, Plan)
    assert torch.is_tensor(open_checkpoint(artifact.model).read("transformer.wte.weight"))
