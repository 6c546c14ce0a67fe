"""A replay in the place of the run it was made from: every file that carries influence goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from orchestrator.failpoints import reach
from orchestrator.stores.files import read_config, read_json, sync_folder, write_atomic, writing

# the configuration last: it says whose the rest is
_NAMES = (
    *("checkpoints", "ledger", "private", "contributions", "adapter", "metrics.jsonl", "summary.json", "report.html"),
    *("partition.json", "labels.json", "config.yaml"),
)


def publish(folder: Path, work: Path) -> None:
    """Put what ``work`` holds in the place of what the run held; the run's journal and its request log stay.

    Stopped anywhere and called again it ends the same. Only for whoever holds the run's lease. ``work`` is gone
    afterwards.

    Raises:
        RunFolderError: if the disk refuses.
    """
    plan, old, done = work / "publish.json", work / "old", work.with_name("done")
    with writing(folder):
        if done.exists():
            shutil.rmtree(done)
        if not work.exists():
            return  # done before a crash
        if not plan.exists():
            config = read_config(work).model_copy(update={"output_dir": read_config(folder).output_dir})
            write_atomic(work / "config.yaml", config.to_yaml())
            new = [name for name in _NAMES if (work / name).exists()]
            old.mkdir(exist_ok=True)
            write_atomic(plan, json.dumps(new))
        new = read_json(plan)
        for name in _NAMES:
            if name in new and not (work / name).exists():
                continue  # moved before a crash
            if (folder / name).is_dir() or (name not in new and (folder / name).exists()):
                if (old / name).exists():  # written anew since a crash
                    shutil.rmtree(folder / name)
                else:
                    (folder / name).rename(old / name)
            reach(f"publish.removed.{name}", 0)
            if name in new:
                (work / name).replace(folder / name)  # of a file, in one step: there is always a configuration
            reach(f"publish.moved.{name}", 0)
        sync_folder(folder)
        work.rename(done)  # in one step: a folder half deleted would look like a replay to publish
        shutil.rmtree(done)
    reach("publish.done", 0)
