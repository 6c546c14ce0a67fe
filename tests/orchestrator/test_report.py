"""The report of a run, drawn from a made-up run folder."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from fedlora.errors import RunFolderError
from orchestrator.report import write_report

NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
LABELS = ["sport", "tech", "politics"]


def make_run(folder: Path, clients: int = 3, labels: list[str] = LABELS, rounds: int = 3) -> Path:
    """A finished run in which c0 is refused in round 1, and every update is 1 MB up and 2 MB down."""
    names = [f"c{i}" for i in range(clients)]
    partition = [
        {
            "client": name,
            "rank": 4 if i % 2 else 8,
            "num_examples": 20 + i % 7,
            "num_heldout": 2,
            "label_counts": {label: (i + j) % 5 for j, label in enumerate(labels) if (i + j) % 5},
        }
        for i, name in enumerate(names)
    ]
    metrics = [
        {
            "round": number,
            "selected": names,
            "admitted": names[1:] if number == 1 else names,
            "refused": {"c0": "too large"} if number == 1 else {},
            "failed": {},
            "train": {"loss": 1 / number, "first_loss": 2 / number},
            "eval": {"loss": 1 / number, "accuracy": 1 - 1 / (number + 1), "examples": 50},
            "clients": {"accuracy": {"worst": 0.1, "p10": 0.3, "median": 0.5, "best": 1.0}, "count": clients},
            "bytes_up": 1_000_000 * clients,
            "bytes_down": 2_000_000 * clients,
            "train_tokens": 789,
            "ranks": {"4": 1, "8": 2},
            "seconds": {"train": 1.0, "aggregate": 0.1, "evaluate": 0.5, "commit": 0.02},
        }
        for number in range(1, rounds + 1)
    ]
    summary = {
        "status": "finished",
        "name": "news",
        "strategy": "flexlora",
        "model": "builtin:minilm",
        "metric": "accuracy",
        "rounds": rounds,
        "initial": {"loss": 1.6, "accuracy": 0.2},
        "final": {"loss": 0.25, "accuracy": 0.751},
        "best": {"round": rounds, "loss": 0.25, "accuracy": 0.751},
        "bytes_up": 1_000_000 * clients * rounds,
        "bytes_down": 2_000_000 * clients * rounds,
        "wall_s": 75.2,
        "train_tokens": 1_234_567,
        "peak_rss_mb": 1432.3,
        "adapter_sha256": "ab" * 32,
        "config_sha256": "cd" * 32,
        "base": {"fingerprint": "ef" * 32, "parameters": 22_713_216, "sites": 36},
        "seconds": {"train": 60.0, "aggregate": 1.0, "evaluate": 10.0, "commit": 0.2},
    }
    journal = [
        {"time": "2026-05-01T12:00:00.5+00:00", "event": "round_committed", "round": 1, "reason": "not an incident"},
        {"time": "2026-05-01T12:00:01.5+00:00", "event": "update_refused", "round": 1, "client": "c0", "reason": "big"},
        {"time": "2026-05-01T12:00:02.5+00:00", "event": "run_interrupted", "round": 2},
    ]
    config = {"name": "news", "data": {"name": "builtin:bbc-news"}, "rounds": rounds, "strategy": "flexlora"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "partition.json").write_text(json.dumps(partition))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in journal))
    return folder


def change(folder: Path, name: str, edit) -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Counts what is opened and checks that it is closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_finished_run_shows_its_key_figures(tmp_path):
    page = page_of(make_run(tmp_path))
    for figure in ("news", "finished", "75.1 %", "0.2500", "9.0 MB", "18.0 MB", "1 min 15 s", "1,234,567", "1,432 MB"):
        assert figure in page
    assert "ab" * 32 in page
    assert "cd" * 32 in page


def test_the_sections_come_in_order_and_every_tag_is_closed(tmp_path):
    page = page_of(make_run(tmp_path))
    titles = ["Curves", "Clients and their data", "Ranks", "Bytes by round", "Time", "Incidents", "Configuration"]
    assert re.findall("<h2>(.*?)</h2>", page) == titles
    assert Tags(page).open == []


def test_the_page_is_one_file_that_refers_to_nothing_outside(tmp_path):
    folder = make_run(tmp_path)
    before = set(folder.iterdir())
    page = page_of(folder)
    assert set(folder.iterdir()) - before == {folder / "report.html"}
    assert set(re.findall(r'https?://[^"\s<]*', page)) <= NAMESPACES
    assert "script" not in Tags(page).seen
    assert "<?xml" not in page


def test_every_chart_has_a_description_and_ids_of_its_own(tmp_path):
    page = page_of(make_run(tmp_path))
    assert len(re.findall(r'<svg role="img" aria-label="[^"]{20,}"', page)) == page.count("<svg") == 6
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_user_text_is_escaped_wherever_it_comes_from(tmp_path):
    folder = make_run(tmp_path, labels=["<b>x", "$\\frac$"])
    change(folder, "partition.json", lambda clients: clients[0].update(client="<i>$_$ 新闻"))
    change(folder, "summary.json", lambda summary: summary.update(name="<u>run", status="<s>", metric='"<q>'))
    with (folder / "journal.jsonl").open("a") as file:
        file.write(json.dumps({"event": "client_failed", "client": "<i>", "reason": "</td><img src=x> \ud800"}) + "\n")
    page = page_of(folder)
    assert "&lt;b&gt;x" in page
    assert not {"b", "u", "s", "q", "img"} & set(Tags(page).seen)
    assert "&lt;i&gt;$_$ 新闻" in page


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    folder = make_run(tmp_path)
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_a_run_without_rounds_or_summary_is_under_way(tmp_path):
    folder = make_run(tmp_path, rounds=0)
    (folder / "summary.json").unlink()
    page = page_of(folder)
    assert "under way" in page
    assert "No round has been committed yet" in page


def test_the_configuration_alone_is_enough_for_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("name: alone\n")
    page = page_of(tmp_path)
    assert "<svg" not in page
    for sentence in ("No partition was recorded", "No times were recorded", "incidents are unknown"):
        assert sentence in page


def test_nulls_and_numbers_that_are_not_finite_leave_gaps(tmp_path):
    folder = make_run(tmp_path)
    change(folder, "summary.json", lambda summary: summary.update(dict.fromkeys(summary)))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[0].update(eval=None, clients=None)
    rows[1]["eval"] = {"loss": float("nan"), "accuracy": 0.5}
    rows[2]["train"] = {"loss": float("inf"), "first_loss": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<dd>–<small>" in page_of(folder)


def test_a_single_round_is_drawn(tmp_path):
    assert page_of(make_run(tmp_path, rounds=1)).count("<svg") == 6


def test_clients_without_labels_are_drawn_by_their_rows(tmp_path):
    page = page_of(make_run(tmp_path, labels=[]))
    assert "Label counts were not recorded" in page
    assert 'aria-label="Rows by client: c0 20, c1 21, c2 22.' in page


def test_many_clients_without_labels_are_a_histogram(tmp_path):
    page = page_of(make_run(tmp_path, labels=[], clients=41, rounds=1))
    assert "Histogram of rows by client, from 20 to 26." in page


def test_200_clients_with_150_labels_are_a_heat_map(tmp_path):
    folder = make_run(tmp_path, clients=200, labels=[f"intent {i}" for i in range(150)])
    page = page_of(folder)
    assert "Heat map of 200 clients and 150 labels" in page
    assert "data:image/png;base64," in page
    assert len(page) < 2_000_000


def test_the_rank_table_counts_clients_rows_rounds_and_updates(tmp_path):
    # c0 and c2 have rank 8, c1 rank 4; c0 was refused in the first of three rounds
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page_of(make_run(tmp_path)).split("<h2>Ranks</h2>")[1])
    assert cells[:10] == ["4", "1", "21", "3", "3", "8", "2", "42", "3", "5"]


def test_the_middle_of_more_than_30_rounds_is_one_row_of_the_byte_table(tmp_path):
    section = page_of(make_run(tmp_path, rounds=31)).split("<h2>Bytes by round</h2>")[1].split("</section>")[0]
    first_cells = re.findall(r'<tr><td class="r">(.*?)</td>', section)
    assert first_cells == ["1", "2", "3", "4", "5", "6 to 11", *map(str, range(12, 32)), "all"]
    assert section.startswith("<details>")
    # six rounds of three clients at 1 MB up and 2 MB down
    assert '<td class="r">18.0 MB</td><td class="r">36.0 MB</td><td class="r">54.0 MB</td>' in section


def test_incidents_are_listed_and_other_events_are_not(tmp_path):
    section = page_of(make_run(tmp_path)).split("<h2>Incidents</h2>")[1].split("</section>")[0]
    assert "1 refused, 1 interrupted." in section
    assert "2026-05-01 12:00:01" in section
    assert "not an incident" not in section


def test_of_many_incidents_the_first_200_are_listed(tmp_path):
    folder = make_run(tmp_path)
    events = [{"event": "client_failed", "round": i, "client": "c1", "reason": "late"} for i in range(250)]
    (folder / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = page_of(folder)
    assert "250 failed; the first 200 are listed" in page
    assert page.count("<td>late</td>") == 200


@pytest.mark.parametrize("torn", [b'{"round": 4, "ev', b'{"round": 4, "refused": {"\xe6\x96', b"\x00\x00"])
def test_a_torn_last_line_is_ignored(tmp_path, torn):
    folder = make_run(tmp_path)
    whole = write_report(folder).read_bytes()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert write_report(folder).read_bytes() == whole


def test_a_torn_line_elsewhere_is_named(tmp_path):
    folder = make_run(tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:30], lines[2]]))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl is damaged"):
        write_report(folder)


def test_a_folder_without_configuration_is_not_a_run(tmp_path):
    with pytest.raises(RunFolderError, match=r"is not a run folder \(no config\.yaml in it\)"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", r"cannot read .*summary\.json: "),
        ("partition.json", "{}", r"partition\.json must hold a JSON list, not dict"),
        ("config.yaml", "a: [", r"config\.yaml is not valid YAML"),
        ("config.yaml", "- a", r"config\.yaml must hold a mapping of keys, not list"),
    ],
)
def test_a_malformed_file_is_named_and_an_older_report_stays(tmp_path, name, content, message):
    folder = make_run(tmp_path)
    older = write_report(folder).read_bytes()
    (folder / name).write_text(content)
    with pytest.raises(RunFolderError, match=message):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == older
