"""The run folder: its name, its metrics across a crash, what it says of the code that ran."""

import json
import subprocess

import pytest

from moeweave.launch import optim, plot, runlog
from moeweave.launch.schema import ConfigError, OptimConfig


def folder_with(tmp_path, text):
    folder = runlog.RunFolder(tmp_path)
    folder.path.mkdir(exist_ok=True)
    folder.metrics.write_text(text)
    return folder


def lines(*steps):
    return "".join(json.dumps({"step": step, "loss": float(step)}) + "\n" for step in steps)


def test_a_new_folder_is_named_by_time_and_name_and_never_shared(tmp_path):
    first = runlog.choose(str(tmp_path), None, "quick")
    first.path.mkdir()
    second = runlog.choose(str(tmp_path), None, "quick")
    assert first.path.name.endswith("-quick")
    assert second.path != first.path


def test_a_named_folder_is_taken_as_it_is_but_not_a_file(tmp_path):
    assert runlog.choose("elsewhere", str(tmp_path / "mine"), "x").path == tmp_path / "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        runlog.choose("elsewhere", str(tmp_path / "file"), "x")


def test_a_folder_inside_a_file_and_an_empty_name_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.dir=.*/file/a/b: .*/file is a file"):
        runlog.choose("elsewhere", str(tmp_path / "file/a/b"), "x")
    with pytest.raises(ConfigError, match=r"run.dir=: is empty"):
        runlog.choose("elsewhere", "", "x")


def test_a_folder_whose_config_is_not_of_a_run_is_refused(tmp_path):
    folder = runlog.RunFolder(tmp_path)
    folder.check_own()
    folder.config.write_text("of: another program\n")
    with pytest.raises(ConfigError, match=r"holds a config.yaml, and no run has left it there"):
        folder.check_own()
    runlog.hold(folder).close()
    folder.check_own()


def test_a_folder_that_a_run_writes_into_is_refused_to_others_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "SECONDS_TO_END", 0.0)
    folder = runlog.RunFolder(tmp_path / "run")
    runlog.check_free(folder)
    held = runlog.hold(folder)
    runlog.record_start(held, folder, ["moeweave-train"])
    for another in (lambda: runlog.check_free(folder), lambda: runlog.hold(folder)):
        with pytest.raises(ConfigError, match=r"another run is writing into it, started at 20.* on "):
            another()
    runlog.hold(folder, alone=False).close()
    held.close()
    runlog.check_free(folder)


def test_a_resume_drops_the_steps_after_the_checkpoint_and_the_line_cut_short(tmp_path):
    folder = folder_with(tmp_path, lines(1, 2, 3, 4) + '{"step": 5, "lo')
    metrics = runlog.Metrics(folder, first_step=3)
    metrics.add({"step": 3, "loss": 30.0})
    metrics.close()
    assert [(line["step"], line["loss"]) for line in runlog.read_metrics(folder)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize("line", ["hi", "3", '{"loss": 1.0}', "\x00\x00"])
def test_a_line_that_is_no_step_is_named(tmp_path, line):
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is no step of a run. Restore the file"):
        runlog.read_metrics(folder_with(tmp_path, lines(1) + line + "\n" + lines(3)))


@pytest.mark.parametrize("held", [(1, 3), (1,), (1, 2, 2), ()])
def test_metrics_that_lack_or_repeat_a_step_before_the_checkpoint_are_refused(tmp_path, held):
    with pytest.raises(ValueError, match=r"does not hold steps 1 to 2 once each.*run.dir=<new folder>"):
        runlog.Metrics(folder_with(tmp_path, lines(*held)), first_step=3)


def test_a_run_from_anothers_checkpoint_has_no_lines_before_and_goes_on_from_its_own(tmp_path):
    folder = folder_with(tmp_path / "run", lines(1, 2))  # of an attempt from step 1 that saved nothing
    assert runlog.Metrics(folder, first_step=3, since=3).lines == []
    folder = folder_with(tmp_path / "run", lines(3, 4, 5))
    with runlog.hold(folder) as starts:
        runlog.record_start(starts, folder, ["moeweave-train"])
        assert (runlog.origin(folder), runlog.first_step(folder)) == (None, 1)
        another = tmp_path / "another/checkpoints/step-00000002"
        for checkpoint in (another, folder.checkpoints / "step-00000004"):
            runlog.record_start(starts, folder, ["moeweave-train"], str(checkpoint))
            assert (runlog.origin(folder), runlog.first_step(folder)) == (another, 3)
    assert [line["step"] for line in runlog.Metrics(folder, first_step=5, since=3).lines] == [3, 4]


def test_a_second_start_says_what_changed(tmp_path):
    folder = runlog.RunFolder(tmp_path / "run")
    for config, command, changed in (("steps: 3", "steps=3", []), ("steps: 5", "a b=5", ["steps: 5"])):
        with runlog.hold(folder) as starts:
            runlog.record_start(starts, folder, ["moeweave-train", command])
        assert runlog.record_config(folder, f"{config}\nseed: 0\n") == changed
    starts = [json.loads(line) for line in (folder.path / "started.jsonl").read_text().splitlines()]
    assert [start["command"] for start in starts] == ["moeweave-train steps=3", "moeweave-train 'a b=5'"]
    assert starts[0]["versions"]["torch"]


def test_git_state_is_the_commit_and_whether_it_was_changed(tmp_path):
    assert runlog.git_state(tmp_path) is None
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True)
    state = runlog.git_state(tmp_path)
    assert len(state["sha"]) == 40
    assert state["dirty"] is False
    (tmp_path / "new").write_text("")
    assert runlog.git_state(tmp_path)["dirty"] is True


def test_the_picture_is_drawn_with_and_without_loads(tmp_path):
    some = [
        {"step": step, "loss": 3.0 / step, "load": {"layers.0.experts": [1, 3], "layers.1.experts": [4, 0]}}
        for step in (1, 2)
    ]
    for name, records in (("a.png", some), ("b.png", [{"step": 1, "loss": 2.0}])):
        plot.draw(records, tmp_path / name, "title")
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.glob("*.partial*"))


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    config = OptimConfig(lr=1.0, warmup_steps=2, min_lr_ratio=0.0)
    rates = [round(optim.learning_rate(step, 6, config), 2) for step in range(1, 7)]
    assert rates == [0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    assert optim.learning_rate(1, 1, OptimConfig(lr=1.0, warmup_steps=0)) == pytest.approx(0.1)
