"""What a client is to forget, and what it is not."""

from __future__ import annotations

from fedlora.config import ForgettingConfig, RunConfig
from fedlora.data.partition import Corpus, open_corpus


def rows_to_forget(
    config: RunConfig, corpus: Corpus, asked: ForgettingConfig, client: str
) -> tuple[list[int], list[int]]:
    """Rows of the training table: those that a client learned from and is to forget, and those that it keeps.

    Args:
        corpus: of the run, which leaves out what is to be forgotten.
    """
    own = list(corpus.shards[client])
    if not asked.records:
        return own, []
    others = [digest for digest in config.data.forget if digest not in asked.records]
    data = config.data.model_copy(update={"forget": others})
    # rows keep their place in the partition, whatever is left out
    before = open_corpus(data, config.clients.count, config.seed, config.model.task)
    return sorted(set(before.shards[client]) - set(own)), own
