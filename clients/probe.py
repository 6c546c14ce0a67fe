"""General ability: rows of another kind that nobody trains on, scored as the model changes."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from fedlora.config import RunConfig
from fedlora.data.partition import Corpus, open_corpus
from fedlora.data.text import Example, encode
from fedlora.errors import DataError
from fedlora.protocol import EvalResult, EvalTask
from fedlora.training.evaluate import evaluate
from fedlora.training.features import features, nearest
from fedlora.training.model import Base


class Probe:
    """The rows of ``evaluation.probe``, read with the first look.

    A language model is scored on the test rows as they are. Of a classifier, whose head knows other labels, the
    features are asked: a test row counts as right when the mean feature of its label's training rows is nearest.

    Source: EMT (Zhai et al., 2023, arXiv 2309.10313), with features of the tuned model in the place of its answers.
    """

    def __init__(self, config: RunConfig):
        self._config = config
        self._known: dict[str, list[Example]] = {}

    def look(self, model: Any, base: Base, task: EvalTask) -> EvalResult:
        """Sums over the probe's test rows of one shard.

        Raises:
            DataError: for rows that the model cannot read.
        """
        rows = self._rows(base)
        size, pad = self._config.training.per_device_eval_batch_size, base.tokenizer.pad_token_id
        shown = rows["test"][task.shard :: task.num_shards]
        if base.spec.task == "causal-lm":
            return evaluate(model, shown, size, pad, base.device)
        taught = rows["train"]
        found = features(model, taught, size, pad, base.device, adapted=True)
        labels = torch.tensor([int(example.labels) for example in taught])  # type: ignore[arg-type]
        present = labels.unique()
        means = torch.stack([found[labels == label].mean(dim=0) for label in present])
        places = nearest(features(model, shown, size, pad, base.device, adapted=True), means.tolist())
        right = sum(int(present[place]) == example.labels for place, example in zip(places, shown, strict=True))
        return EvalResult("", 0.0, 0, right, len(shown))

    def _rows(self, base: Base) -> dict[str, list[Example]]:
        if not self._known:
            settings = self._config.evaluation.probe
            assert settings is not None
            try:
                corpus = open_corpus(settings.model_copy(update={"client_holdout": 0}), 1, 0, base.spec.task)
            except DataError as error:
                raise DataError(f"evaluation.probe: {error}") from error
            if (corpus.form == "classification") != (base.spec.task == "sequence-classification"):
                raise DataError(f"evaluation.probe: the rows are {corpus.form}, and the model is a {base.spec.task}")
            self._known = {
                "train": self._encoded(corpus.train, corpus, base) if corpus.labels else [],
                "test": self._encoded(corpus.test, corpus, base),
            }
        return self._known

    def _encoded(self, table: Dataset, corpus: Corpus, base: Base) -> list[Example]:
        limit = self._config.data.max_length
        return encode(table.to_list(), corpus.form, base.tokenizer, limit, corpus.labels, "rows of the probe").examples
