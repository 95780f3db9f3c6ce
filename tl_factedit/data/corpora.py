"""Plain text: corpora to stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


def python_manual() -> list[str]:
    """English prose that every Python has: the topics of its own manual, some 100,000 tokens.

    Texts for `key_stats` where nothing can be downloaded. Their domain is narrow: for results that
    are to be published, give texts of the kind the model was trained on.
    """
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


@dataclass(frozen=True)
class Corpus:
    """Texts of a dataset, streamed anew each time they are iterated; nothing is kept or read ahead.

    Attributes:
        name: The dataset.
        config: What else `datasets.load_dataset` takes by place: the name of a configuration.
        split: Which part.
        field: The column that holds the texts.
        revision: A commit, tag or branch of the hub; None for the newest, which may change between two runs.
        data_files: Files to read where `name` is a format (``"json"``, ``"parquet"``, ``"text"`` …).

    Example:
        >>> fe.data.Corpus("wikimedia/wikipedia", ("20231101.en",), revision="b04c8d1")
        Corpus('wikimedia/wikipedia', '20231101.en', split='train', field='text', revision='b04c8d1')
    """

    name: str
    config: tuple[str, ...] = ()
    split: str = "train"
    field: str = "text"
    revision: str | None = None
    data_files: str | tuple[str, ...] | None = None

    def __iter__(self) -> Iterator[str]:
        """The texts, from the first one on.

        Raises:
            OSError: The hub can't be reached, or there is no such dataset or file.
            ValueError: No such configuration or split; or no such field, or one that holds no text.
        """
        import datasets

        files = list(self.data_files) if isinstance(self.data_files, tuple) else self.data_files
        try:
            rows = datasets.load_dataset(
                self.name, *self.config, split=self.split, revision=self.revision, data_files=files, streaming=True
            )
            for i, row in enumerate(rows):
                if not isinstance(row.get(self.field), str):
                    texts = sorted(name for name, value in row.items() if isinstance(value, str))
                    raise ValueError(f"record {i} of {self!r} has no text in {self.field!r}; fields with text: {texts}")
                yield row[self.field]
        except OSError as error:
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise OSError(
                f"{self!r} could not be had ({why}): check the name and the network, give a file with data_files=, or "
                "take texts that need no hub: a list of your own, fe.data.python_manual() or "
                "fe.stats.sample_texts(model, n_tokens)"
            ) from error

    def __repr__(self) -> str:
        """The call that makes it."""
        named = {
            "split": self.split,
            "field": self.field,
            "revision": self.revision,
            "data_files": self.data_files,
        }
        given = [f"{key}={value!r}" for key, value in named.items() if value is not None]
        return f"Corpus({', '.join([*map(repr, (self.name, *self.config)), *given])})"


def corpus(
    name: str,
    *config: str,
    split: str = "train",
    field: str = "text",
    revision: str | None = None,
    data_files: str | Path | Sequence[str | Path] | None = None,
) -> Corpus:
    """The texts of any dataset that the package `datasets` can stream, for `key_stats`.

    It can be iterated again and again, so that a collection that was killed can go on.

    Args:
        name: A dataset of the hub, a folder, or a format (``"json"``, ``"parquet"``, ``"text"`` …) with `data_files`.
        *config: The name of a configuration, where the dataset has several.
        split: Which part.
        field: The column that holds the texts.
        revision: A commit, tag or branch of the hub; None for the newest, which may change between two runs.
        data_files: Files of your own.

    Example:
        >>> texts = fe.data.corpus("wikimedia/wikipedia", "20231101.en")               # doctest: +SKIP
        >>> texts = fe.data.corpus("json", data_files="articles.jsonl", field="body")  # doctest: +SKIP
        >>> stats = fe.key_stats(model, 8, texts, path="stats/")                       # doctest: +SKIP
    """
    if isinstance(data_files, (str, Path)):
        files: str | tuple[str, ...] | None = str(data_files)
    else:
        files = None if data_files is None else tuple(str(file) for file in data_files)
    return Corpus(name, config, split, field, revision, files)
