"""Configuration: every problem at once, each with the nearest known key."""

from pathlib import Path

import pytest
import yaml

from fedlora.config import differences, load_config, parse_config
from fedlora.errors import ConfigError

MINIMAL = {"model": {"name": "m"}, "data": {"name": "d"}}
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def problems(content: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(content)
    return caught.value.problems


def test_an_unknown_key_names_the_nearest_key_of_its_section() -> None:
    assert problems({**MINIMAL, "training": {"learning_rat": 1}}) == [
        "config: training.learning_rat is not a key; did you mean training.learning_rate?"
    ]


def test_a_key_in_the_wrong_section_is_pointed_to_the_right_one() -> None:
    assert problems({**MINIMAL, "training": {"r": 4}}) == ["config: training.r is not a key; did you mean lora.r?"]


def test_all_problems_are_reported_at_once() -> None:
    found = problems({"model": {"name": "m", "dtype": "int3"}, "data": {"name": "d"}, "rounds": 0, "sed": 1})
    assert len(found) == 3
    assert "model.dtype" in found[0]
    assert found[2] == "config: sed is not a key; did you mean seed?"


def test_a_wrong_type_says_what_came() -> None:
    assert problems({**MINIMAL, "rounds": "many"}) == [
        "config: rounds is 'many': input should be a valid integer, unable to parse string as an integer"
    ]


@pytest.mark.parametrize(
    "ranks", [0, [4, 0], [], "four", {"distribution": {}}, {"by_size": {4: 1}}, {"distribution": {0: 1}}]
)
def test_ranks_that_are_not_ranks_are_refused(ranks: object) -> None:
    assert "clients.ranks" in problems({**MINIMAL, "clients": {"ranks": ranks}})[0]


def test_a_client_rank_above_the_global_rank_is_refused() -> None:
    assert "raise lora.r" in problems({**MINIMAL, "clients": {"ranks": [4, 32]}})[0]


def test_a_run_needs_data_from_one_place() -> None:
    assert "needs a name" in problems({"model": {"name": "m"}, "data": {}})[0]
    both = {"train_file": "a.jsonl", "client_files": {"a": "b"}}
    assert "give one" in problems({"model": {"name": "m"}, "data": both})[0]


def test_scientific_notation_without_a_point_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 3e-3 as text."""
    path = tmp_path / "c.yaml"
    path.write_text("model: {name: m}\ndata: {name: d}\ntraining: {learning_rate: 3e-3}\n")
    assert load_config(path).training.learning_rate == 0.003


def test_overrides_set_nested_and_missing_keys(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name: m}\ndata: {name: d}\n")
    config = load_config(path, ["training.learning_rate=0.5", "strategy=fedit", "clients.ranks=[2, 4]"])
    assert config.training.learning_rate == 0.5
    assert config.strategy_name == "fedit"
    assert config.clients.ranks == [2, 4]
    assert config.output_dir.startswith("runs/c-")
    assert load_config(path).output_dir == "runs/c"


def test_overrides_find_the_tasks_of_a_stream_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    tasks = [{"name": "north", "where": {"site": ["n"]}}, {"name": "south", "where": {"site": ["s"]}}]
    path.write_text(yaml.safe_dump({**MINIMAL, "continual": {"tasks": tasks}}))
    config = load_config(path, ["continual.tasks.south.rounds=7", "continual.tasks.south.data.train_file=a.jsonl"])
    assert config.continual is not None
    assert [task.rounds for task in config.continual.tasks] == [None, 7]
    assert config.continual.tasks[1].data is not None
    assert config.continual.tasks[1].data.train_file == "a.jsonl"
    with pytest.raises(ConfigError, match="there is no nort.*did you mean north"):
        load_config(path, ["continual.tasks.nort.rounds=7"])
    with pytest.raises(ConfigError, match="name a key of south"):
        load_config(path, ["continual.tasks.south=7"])


def test_runs_with_other_overrides_go_to_other_folders(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name: m}\ndata: {name: d}\n")
    folders = [load_config(path, sets).output_dir for sets in (["rounds=1"], ["rounds=2"], ["rounds=1"])]
    assert folders[0] == folders[2] != folders[1]
    assert load_config(path, ["rounds=1", "output_dir=here"]).output_dir == "here"


@pytest.mark.parametrize("override", ["rounds", "=3", "model.name.x=1", "rounds=[1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name: m}\ndata: {name: d}\n")
    with pytest.raises(ConfigError, match="--set"):
        load_config(path, [override])


@pytest.mark.parametrize("text", ["- a\n- b\n", "model: [", "\x00", ""])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config: "):
        load_config(path)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(ConfigError, match=r"did you mean .*quickstart\.yaml"):
        load_config(tmp_path / "quikstart.yaml")


def test_a_resolved_configuration_reads_back_as_itself() -> None:
    config = parse_config({**MINIMAL, "lora": {"r": 16}, "clients": {"ranks": {"distribution": {4: 0.5, 16: 0.5}}}})
    again = parse_config(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert again.sha256() == config.sha256()


def test_the_hash_ignores_where_results_go_and_nothing_else() -> None:
    config = parse_config(MINIMAL)
    assert parse_config({**MINIMAL, "output_dir": "elsewhere"}).sha256() == config.sha256()
    other = parse_config({**MINIMAL, "seed": 1})
    assert other.sha256() != config.sha256()
    assert differences(config, other) == ["seed"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_begins_with_its_command(path: Path) -> None:
    assert path.read_text().splitlines()[0].startswith(f"# fedlora run configs/{path.name}")
    files = ["data.train_file=a.jsonl", "data.test_file=b.jsonl"]
    stream = load_config(path).continual
    rounds = "continual.rounds=2" if stream else "rounds=2"
    config = load_config(path, [rounds, "seed=1", "pool=ray", "strategy=zero_pad", "output_dir=x", *files])
    assert config.rounds == 2 * (len(stream.names) if stream else 1)
    assert (config.seed, config.pool, config.strategy_name) == (1, "ray", "zero_pad")
    assert config.data.train_file == "a.jsonl"


def test_a_minimal_configuration_survives_being_written_and_read() -> None:
    """A run folder holds the resolved configuration, defaults included."""
    config = parse_config(MINIMAL)
    assert parse_config(yaml.safe_load(config.to_yaml())).sha256() == config.sha256()
