"""Configs: every shipped one composes, and a wrong one is refused with the path, the rule and the remedy."""

import dataclasses
import itertools
import re

import pytest

from moeweave.comm.codec import Codec
from moeweave.launch import cli, compose, prepare, submit, submit_schema, train, verify
from moeweave.launch.schema import BenchConfig, ConfigError, TrainConfig, VerifyConfig
from moeweave.launch.submit_schema import SubmitConfig
from moeweave.parallel.plan import Plan


def load(*overrides: str, config_dir: str | None = None) -> TrainConfig:
    return compose.load(TrainConfig, "train", overrides, config_dir)


def test_the_quickstart_is_two_ranks_that_share_out_the_experts():
    config = load("experiment=quickstart")
    assert (config.mesh.dp, config.mesh.ep, config.mesh.sizes().world) == (2, 2, 2)
    assert config.model.source == "qwen3_moe"
    assert config.model.overrides["num_experts"] == 8
    assert config.data.path is None


def test_the_command_line_beats_the_experiment_and_the_groups():
    config = load("experiment=quickstart", "steps=7", "optim.lr=0.5", "plan.dispatcher=alltoall", "model=mixtral")
    assert (config.steps, config.optim.lr, config.plan["dispatcher"]) == (7, 0.5, "alltoall")
    assert (config.model.source, config.model.overrides, config.mesh.dp) == ("mixtral", {}, 2)


def test_every_option_of_every_group_composes():
    for group, options in compose.groups().items():
        for option in options:
            if group == "launcher":
                _, launcher = submit_schema.load(compose.values(SubmitConfig, "submit", [f"launcher={option}"]))
                assert launcher.kind == option.partition("_")[0]  # slurm_a2 is slurm with other defaults
            else:
                assert isinstance(load(f"{group}={option}"), TrainConfig)
    assert isinstance(compose.load(VerifyConfig, "verify", []), VerifyConfig)
    assert isinstance(compose.load(BenchConfig, "bench", []), BenchConfig)


def test_a_launchers_group_has_exactly_the_fields_of_its_schema():
    for name, schema in submit_schema.LAUNCHERS.items():
        composed = compose.values(SubmitConfig, "submit", [f"launcher={name}"])["launcher"]
        assert composed == dataclasses.asdict(schema()), name


def test_submits_own_keys_are_no_keys_of_the_programs():
    own = {field.name for field in dataclasses.fields(SubmitConfig)}
    for schema in (TrainConfig, BenchConfig):
        assert own & {field.name for field in dataclasses.fields(schema)} <= {"run"}


def test_the_plan_group_has_exactly_the_fields_of_plan():
    assert list(load().plan) == [field.name for field in dataclasses.fields(Plan)]
    assert Plan.from_dict(load().plan) == Plan()


@pytest.mark.parametrize("path", sorted(compose.CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_comment_stands_above_every_field(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    for above, line in itertools.pairwise(lines):
        if re.match(r"^ *\w+: \S", line) and not line.lstrip().startswith("-"):
            assert above.lstrip().startswith("# "), f"{path.name}: {line.strip()} has no comment above it"


def test_help_shows_worked_commands_groups_and_every_field():
    for program in (train.PROGRAM, verify.PROGRAM, submit.PROGRAM):
        text = cli.help_text(program)
        for command, _ in program.examples:
            assert command in text
        for field in dataclasses.fields(program.schema):
            assert re.search(rf"^  {field.name}[.=]", text, re.MULTILINE), field.name
    assert "optim.lr=1.0e-3\n      Peak learning rate." in cli.help_text(train.PROGRAM)


def test_help_names_the_fields_of_every_launcher_as_one_types_them():
    text = cli.help_text(submit.PROGRAM)
    for option in compose.groups()["launcher"]:
        shown = re.search(rf"launcher={option}( is .*)?:\n((?:  .*\n?)*)", text)
        typed = re.findall(r"^  ([\w.]+)=", shown[2], re.MULTILINE) if shown else []
        assert option == "local" or typed
        for name in typed:
            found = compose.values(submit.PROGRAM.schema, "submit", [f"launcher={option}"])
            for part in name.split("."):
                assert part in found, f"launcher={option}: {name}"
                found = found[part]


def test_every_worked_command_of_the_help_composes(tmp_path):
    for program in (train.PROGRAM, verify.PROGRAM):
        for command, _ in program.examples:
            words = command.split()[command.split().index(program.name) + 1 :] if program.name in command else []
            compose.load(program.schema, program.config, words)


@pytest.mark.parametrize(
    "override, message",
    [
        ("stps=3", "unknown config key stps.*Did you mean steps?"),
        ("optim.lrr=3", "unknown config key optim.lrr: the fields of optim are lr, .*Did you mean optim.lr?"),
        ("lr=3", "Did you mean optim.lr?"),
        ("plan.dispatchr=x", "unknown config key plan.dispatchr.*Did you mean plan.dispatcher?"),
        ("optim.lr=abc", "optim.lr: Value 'abc'.*Float"),
        ("steps=null", "steps: Incompatible value 'None'"),
        ("steps=0", "steps=0: must be at least 1. Set steps=1 or more."),
        ("seed=-1", "seed=-1: must be at least 0"),
        ("seed=99999999999999999999", r"must be at least 0 and below 2\*\*63"),
        ("optim.beta1=1.0", "optim.beta1=1.0: must be at least 0 and below 1"),
        ("optim.lr=inf", "optim.lr=inf: must be finite"),
        ("name=../up", "name=../up: is no file name"),
        ("name=", "name=: is no file name"),
        ("mesh.device=gpu", "mesh.device=gpu: must be one of cuda, npu, cpu"),
        ("steps.x=3", "steps is one value, not a group"),
        ("mesh=4", "mesh=4: is a group of fields.*mesh.dp"),
        ("log.progress=bars", "must be one of auto, bar, lines, off. Did you mean log.progress=bar?"),
        ("experiment=quick", "experiment=quick: must be one of .*quickstart"),
        ("data=book.txt", "write data.path=book.txt"),
        ("steps=1,2", "several values"),
        ("~steps", "cannot be removed"),
        ("nonsense", "Write key=value"),
        ("plan.dispatcher={a:1", "cannot read the argument"),
        (
            "batch_size=3",
            "batch_size=3: must be a multiple of data ranks x microbatches = 2 x 1 = 2. Set batch_size=4.",
        ),
    ],
)
def test_a_wrong_argument_is_refused_with_rule_and_remedy(override, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load("mesh.dp=2", override)


def test_mesh_sizes_that_do_not_divide_list_the_legal_ones():
    with pytest.raises(ValueError, match=r"must divide dp \* sp \* tp \(6\).*ep can be 1, 2, 3, 6"):
        load("mesh.dp=6", "mesh.ep=4", "batch_size=12")


@pytest.mark.parametrize("value", ["/tmp/a b.txt", "/tmp/a=b(c),d.txt", "C:\\texts\\it's.txt", "./x.txt", "~/x.txt"])
def test_a_path_needs_no_quotes_of_its_own(value):
    assert load(f"data.path={value}").data.path == value


@pytest.mark.parametrize(
    "argument, codec",
    [
        ("plan.codec=int8", Codec(dispatch="int8")),
        ("plan.codec={dispatch:fp8,scale:group128}", Codec(dispatch="fp8", scale="group128")),
        ("plan.codec={combine:int8,combine_backward:fp8_e5m2}", Codec(combine="int8", combine_backward="fp8_e5m2")),
        ("plan.codec=null", Codec()),
    ],
)
def test_a_codec_is_a_format_or_a_mapping(argument, codec):
    assert Plan.from_dict(load(argument).plan).codec == codec


def test_a_codec_that_does_not_fit_the_model_is_refused_before_ranks_start():
    config = load("experiment=quickstart", "plan.codec={dispatch:fp8,scale:group128}", "model.overrides.hidden_size=96")
    with pytest.raises(ValueError, match=r"experts: codec \(dispatch=fp8 scale=group128\): width \(96\) must be"):
        prepare.check_model(config.model, config.mesh, config.plan)


def test_free_fields_of_the_model_config_need_no_plus_sign():
    config = load("model=mixtral", "model.overrides.num_local_experts=4", "model.overrides.rope={a: 1}")
    assert config.model.overrides == {"num_local_experts": 4, "rope": {"a": 1}}


def test_a_folder_of_the_users_own_groups_is_searched(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nsteps: 3\nmesh:\n  dp: 2\n")
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\nstep: 3\n")
    assert load("experiment=mine", config_dir=str(tmp_path)).steps == 3
    with pytest.raises(ConfigError, match=r"unknown config key step.*Did you mean steps\?"):
        load("experiment=typo", config_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="no such folder"):
        load(config_dir=str(tmp_path / "missing"))


def test_the_yaml_of_a_config_builds_the_same_config():
    from omegaconf import OmegaConf

    from moeweave.launch.strict import build

    config = load("experiment=quickstart", "data.path=a b.txt")
    assert build(TrainConfig, OmegaConf.to_container(OmegaConf.create(compose.to_yaml(config)))) == config
