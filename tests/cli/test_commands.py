"""Commands as people and scripts use them: data on stdout, one line of what went wrong on stderr."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import poise
from poise.cli import app
from poise.core.artifact import Artifact
from poise.core.errors import MissingExtra


@pytest.fixture(scope="module")
def made(model_factory, tmp_path_factory):
    """An artifact that a test must not change."""
    out = tmp_path_factory.mktemp("made") / "small"
    poise.quantize(model_factory("llama", "bfloat16"), "mobile", out, to="compressed-tensors")
    return out


@pytest.fixture
def artifact(made, tmp_path):
    return shutil.copytree(made, tmp_path / "small")


def one_line(err):
    """The message of an error that a user can act on."""
    assert err.startswith("poise: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err.removeprefix("poise: ").strip()


EVALUATE = ("--no-efficiency", "--windows", "2", "--window", "48")


def test_quantize_prints_what_it_made(run, llama, tmp_path):
    code, out, err = run("quantize", llama, "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    manifest = Artifact.open(tmp_path / "out").manifest
    assert f"{manifest.bits_per_weight:.3f} bits per weight" in out
    assert "mobile for gguf" in out


def test_quantize_as_json(run, llama, tmp_path):
    both = ("--to", "gguf", "--to", "compressed-tensors")
    code, out, err = run("quantize", llama, "-o", tmp_path / "out", *both, "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["schema_version"] == 1
    for name, made in zip(("gguf", "compressed-tensors"), record["artifacts"], strict=True):
        assert made["path"] == str(tmp_path / "out" / name)
        assert made["manifest"] == json.loads((tmp_path / "out" / name / "manifest.json").read_text())
        assert poise.checkpoints.open_checkpoint(made["model"])


def test_a_dry_run_makes_nothing(run, llama, tmp_path):
    code, out, _ = run("quantize", llama, "-o", tmp_path / "out", "--dry-run", "--json")
    assert code == 0
    (estimate,) = json.loads(out)["estimates"]
    assert estimate["artifact_bytes"] < estimate["source_bytes"]
    assert estimate["out"] == str(tmp_path / "out")
    assert estimate["plan"]["rows"]
    code, out, _ = run("quantize", llama, "-o", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "would take" in out
    assert not list(tmp_path.glob("out*"))


def test_evaluate_passes_with_0_and_its_json_is_the_report(run, artifact, llama, tmp_path):
    code, out, err = run(
        "evaluate", artifact, "--reference", llama, *EVALUATE, "--json", "-o", tmp_path / "report"
    )
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "report" / "report.json").read_text())
    assert json.loads(out)["passed"] is True


def test_a_missed_quality_gate_is_3_and_is_told_all_the_same(run, made, artifact, llama, monkeypatch):
    monkeypatch.setitem(poise.core.comparison.DEFAULT_GATES, "kl", 1e-9)
    code, out, err = run("evaluate", artifact, "--reference", llama, *EVALUATE)
    assert (code, err) == (3, "")
    assert re.search(r"kl \(decides\).*missed", out)
    code, out, _ = run("evaluate", artifact, "--reference", llama, *EVALUATE, "--json")
    assert code == 3
    assert json.loads(out)["passed"] is False


def test_a_missed_efficiency_gate_is_0(run, llama):
    code, out, _ = run("evaluate", llama, "--reference", llama, *EVALUATE)
    assert code == 0
    assert re.search(r"size reduction.*missed", out)


def test_inspect_a_checkpoint(run, llama):
    code, out, err = run("inspect", llama, "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert (record["kind"], record["dtype"], record["manifest"]) == ("huggingface", "bfloat16", None)
    assert record["tensors"]["lm_head.weight"]["linear"]["role"] == "head"
    assert record["tensors"]["model.norm.weight"]["linear"] is None
    assert record["bytes"] == sum(info["nbytes"] for info in record["tensors"].values())


def test_inspect_does_not_cut_names_that_go_to_a_program(run, llama):
    _, out, _ = run("inspect", llama, "--json")
    code, table, _ = run("inspect", llama, "--tensors")
    assert code == 0
    for name in json.loads(out)["tensors"]:
        assert name in table


def test_inspect_a_plan(run, made):
    code, out, _ = run("inspect", made / "plan.json", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((made / "plan.json").read_text())
    code, out, _ = run("inspect", made / "plan.json")
    assert code == 0
    assert "mobile for compressed-tensors" in out


def test_inspect_an_artifact(run, made):
    code, out, _ = run("inspect", made, "--json")
    assert code == 0
    assert json.loads(out)["manifest"] == json.loads((made / "manifest.json").read_text())
    code, out, _ = run("inspect", made)
    assert code == 0
    assert "read back bit for bit" in out


@pytest.mark.parametrize("options", [(), ("--json",), ("--tensors",)])
def test_inspect_names_what_was_changed_in_an_artifact(run, artifact, options):
    (artifact / "plan.json").write_text((artifact / "plan.json").read_text() + "\n")
    (artifact / "tokenizer.json").unlink(missing_ok=True)
    code, _, err = run("inspect", artifact, *options)
    assert code == 1
    assert "plan.json" in one_line(err)
    assert "differ from the manifest" in err
    assert "README.md" not in err


def test_inspect_notices_one_flipped_bit(run, artifact):
    file = artifact / Artifact.open(artifact).manifest.model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, _, err = run("inspect", artifact)
    assert code == 1
    assert "model.safetensors" in one_line(err)


def test_bench_puts_models_side_by_side(run, llama, monkeypatch):
    """Two tiny models; memory needs a fresh process each, so it has a test of its own."""
    monkeypatch.setattr("poise.metrics.memory.Memory.measure", lambda self, subjects: [[] for _ in subjects])
    code, out, err = run(
        "bench", llama, llama, "--engine", "torch", "--engine", "fake(vocabulary=320)", "--json"
    )
    assert (code, err) == (0, "")
    first, second = json.loads(out)["models"]
    assert first["label"] == second["label"] == llama.name
    assert [side["engine"] for side in (first, second)] == ["torch", "fake(vocabulary=320)"]
    scores = {score["name"]: score["value"] for score in second["scores"]}
    assert scores["time_per_token"] == pytest.approx(0.01)
    assert scores["throughput"] == pytest.approx(100)
    code, out, _ = run("bench", llama, llama, "--engine", "fake()", "--engine", "fake()")
    assert code == 0
    assert "(1.00x)" in out


def test_doctor(run):
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    findings = {finding["what"]: finding for finding in json.loads(out)["findings"]}
    assert findings["python"]["ok"]
    assert findings["torch"]["found"]
    assert {"engine llamacpp", "cores", "free disk here", "hub"} <= set(findings)
    code, out, _ = run("doctor")
    assert code == 0
    assert "python" in out


def test_doctor_says_how_to_install_what_is_missing(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, _ = run("doctor")
    assert code == 0, "an engine is optional"
    assert "pip install 'poise[llamacpp]'" in out


def test_an_existing_output_is_2(run, llama, artifact):
    code, out, err = run("quantize", llama, "-o", artifact)
    assert (code, out) == (2, "")
    assert "exists; choose another folder, or --force" in one_line(err)
    assert Artifact.open(artifact).damaged() == []


RECIPES = {
    "unknown key": ("description: d\nrules:\n- {kep: true}\n", "did you mean 'keep'"),
    "no YAML": ("description: [d\nrules: {\n", "not YAML"),
    "unknown format": ("description: d\nrules:\n- options: [ant(bits=4)]\n", "did you mean 'int'"),
    "unknown gate": ("description: d\nrules:\n- keep: true\ngates: {kll: 1}\n", "unknown gate"),
    "empty": ("", "recipe.yaml"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_bad_recipe_is_2_and_one_line(run, llama, tmp_path, case):
    content, message = RECIPES[case]
    (tmp_path / "recipe.yaml").write_text(content)
    code, out, err = run("quantize", llama, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in one_line(err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("quantize", "{model}", "--recipe", "mobil"), 2, "did you mean 'mobile'"),
        (("quantize", "{model}", "--to", "ggfu"), 2, "did you mean 'gguf'"),
        (("quantize", "{here}/nowhere"), 1, "no such folder or file"),
        (("quantize", "{model}", "-o", "{here}/file/out"), 1, "file"),
        (("quantize", "{model}", "-o", "{here}/file"), 2, "is a file; name a folder"),
        (("quantize", "{model}", "--calibration", "{here}/nothing.txt"), 2, "cannot be read"),
        (
            ("evaluate", "{model}", "--reference", "{model}", "--text", "{here}/nothing.txt"),
            2,
            "cannot be read",
        ),
        (("evaluate", "{model}", "--reference", "{here}/nowhere"), 1, "no such folder or file"),
        (
            ("evaluate", "{model}", "--reference", "{model}", "-o", "{here}/file"),
            2,
            "is a file; name a folder",
        ),
        (("inspect", "{here}/nothing.json"), 2, "nothing.json"),
        (("inspect", "{model}/config.json"), 2, "config.json: not a plan"),
        (("bench", "{model}", "{model}", "--engine", "torch"), 2, "2 models but 1 engines"),
    ],
    ids=lambda value: "-".join(map(str, value[:1])) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_done_is_one_line(run, llama, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    ended, out, err = run(*(part.format(model=llama, here=tmp_path) for part in arguments))
    assert (ended, out) == (code, "")
    assert message in one_line(err)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_checkpoint_is_1(run, llama, copy_of, tmp_path):
    folder = copy_of(llama)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    for arguments in (("quantize", folder, "-o", tmp_path / "out"), ("inspect", folder)):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "")
        assert "damaged or truncated" in one_line(err)


def test_a_missing_extra_is_5(run, llama, monkeypatch):
    def missing(self, checkpoint):
        raise MissingExtra("xllamacpp", "llamacpp")

    monkeypatch.setattr("poise.engines.torch.Torch.load", missing)
    code, _, err = run("evaluate", llama, "--reference", llama, *EVALUATE)
    assert code == 5
    assert "pip install 'poise[llamacpp]'" in one_line(err)


@pytest.mark.parametrize("arguments", [("--nonsense",), ("nonsense",), ("quantize",), ("evaluate", "x")])
def test_what_the_command_line_does_not_know_is_2(arguments):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_limits_of_options_are_checked_before_anything_is_read():
    for option in (("--window", "2"), ("--windows", "0")):
        done = CliRunner().invoke(app, ["evaluate", "x", "--reference", "y", *option])
        assert done.exit_code == 2
        assert option[0] in done.stderr


def test_every_command_has_help_with_its_options():
    for command in ("quantize", "evaluate", "inspect", "bench", "doctor"):
        done = CliRunner().invoke(app, [command, "--help"])
        assert done.exit_code == 0
        assert "--json" in done.stdout
    done = CliRunner().invoke(app, ["--help"])
    assert "quantize" in done.stdout
    assert "probe" not in done.stdout, "it is for the memory metric"


def poise_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "poise", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_process_keeps_data_and_messages_apart(llama, tmp_path):
    done = poise_process("quantize", llama, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["artifacts"]
    assert done.stderr == ""
    done = poise_process("quantize", llama, "-o", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr)


def test_no_color_is_honoured(made):
    plain = poise_process("inspect", made, NO_COLOR="1", FORCE_COLOR="1")
    colour = r"\x1b\[[0-9;]*3[0-7]m"
    assert plain.returncode == 0
    assert not re.search(colour, plain.stdout)
    coloured = {"FORCE_COLOR": "1", "NO_COLOR": "", "TERM": "xterm-256color"}
    assert "\x1b[" in poise_process("inspect", made, **coloured).stdout


def test_a_probe_prints_one_json_object(llama):
    done = poise_process("probe", llama, "--engine", "torch")
    assert done.returncode == 0
    memory = json.loads(done.stdout)
    taken = memory["peak"] - memory["before"]
    assert 0 < taken < 60e6, "a model of 0.2 MB; the libraries under it take twice as much as this"


def test_choosing_calibration_text(run, llama, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(" ".join(f"sentence {n} about cats, mats and number {n * n}." for n in range(200)))
    command = ("calibrate", "select", llama, "--from", corpus, "--windows", "4", "--length", "64")
    code, out, _ = run(*command, "-o", tmp_path / "chosen.jsonl")
    assert code == 0
    assert "4 of" in out
    assert len((tmp_path / "chosen.jsonl").read_text().splitlines()) == 4
    code, out, _ = run(*command, "--json")
    assert code == 0
    assert json.loads(out)["schema_version"] == 1


def test_a_preset_and_a_recipe_exclude_each_other(run, llama, tmp_path):
    code, _, err = run("quantize", llama, "--recipe", "mobile", "--preset", "fast", "-o", tmp_path / "out")
    assert code == 2
    assert "not both" in err
    code, _, err = run("quantize", llama, "--preset", "slow", "-o", tmp_path / "out")
    assert code == 2
    assert "fast, balanced, best" in err


def test_a_preset_from_the_command_line(run, llama, tmp_path):
    code, out, _ = run(
        *("quantize", llama, "--preset", "balanced", "--bits", "3", "--group", "32"),
        *("--to", "compressed-tensors", "-o", tmp_path / "out", "--json"),
    )
    assert code == 0
    assert 3 < json.loads(out)["artifacts"][0]["manifest"]["linear_bits_per_weight"] < 4.2
