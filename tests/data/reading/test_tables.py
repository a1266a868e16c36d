"""Several files read as one table, and every row knows its place."""

from __future__ import annotations

import pytest

from lorasweep.data.reading.tables import find_tables, read_table
from lorasweep.errors import ConfigError


def choose(names, place):
    return list(names)


def write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)


def test_rows_of_several_files_know_their_file_and_line(folder):
    write(folder, a_csv="text\none\ntwo\n", b_csv="text\n\nthree\n")
    table = read_table(find_tables("*.csv", key="data.train"), choose=choose)
    assert table.columns == {"text": ["one", "two", "three"]}
    assert [table.place(row) for row in range(len(table))] == [
        "line 2 of 'a.csv'",
        "line 3 of 'a.csv'",
        "line 3 of 'b.csv'",
    ]


def test_some_rows_of_a_table_keep_their_places(folder):
    write(folder, a_csv="text\none\ntwo\n")
    table = read_table(find_tables("a.csv", key="data.train"), choose=choose).take([1], note="Half of it.")
    assert (table.columns, table.place(0), table.notes) == ({"text": ["two"]}, "line 3 of 'a.csv'", ("Half of it.",))


def test_rows_of_json_arrays_and_of_json_lines_are_counted_as_they_are(folder):
    write(folder, a_json='[{"text": "one"}]', b_json='\n{"text": "one"}')
    assert read_table(find_tables("a.json", key="data.train"), choose=choose).place(0) == "row 1 of 'a.json'"
    assert read_table(find_tables("b.json", key="data.train"), choose=choose).place(0) == "line 2 of 'b.json'"


def test_columns_are_the_same_in_all_files(folder):
    write(folder, a_csv="text\none\n", b_csv="other\ntwo\n")
    with pytest.raises(ConfigError, match=r"same columns, but 'b.csv' has other where 'a.csv' has text."):
        read_table(find_tables("*.csv", key="data.train"), choose=choose)


def test_file_with_a_header_alone_is_named(folder):
    write(folder, a_csv="text\none\n", b_csv="text\n")
    with pytest.raises(ConfigError, match=r"'b.csv' must have rows, but has none below its header."):
        read_table(find_tables("*.csv", key="data.train"), choose=choose)


def test_quotes_that_a_csv_writer_left_in_a_tsv_are_noted(folder):
    write(folder, a_tsv='text\n"He said ""so"""\n"Great."\n', b_tsv='text\n"A" and "B"\n')
    noted = read_table(find_tables("a.tsv", key="data.train"), choose=choose)
    assert noted.notes == ("1 texts of 'a.tsv' look quoted as in csv; in a tsv quotes are part of the text.",)
    assert read_table(find_tables("b.tsv", key="data.train"), choose=choose).notes == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (".", "`data.test` must name a file or a glob such as './\\*.csv', but '.' is a folder."),
        (
            "a.xlsx",
            "`data.test` must name a file that ends in .csv, .tsv, .jsonl, .json, .parquet, but got 'a.xlsx'. Save",
        ),
        ("*.*", r"`data.test` must name a file that ends in .*, but got '\*.\*' with .xlsx."),
        ("[bc].*", r"`data.test` must name files of one kind, but '\[bc\].\*' has .csv, .tsv."),
    ],
)
def test_what_is_no_table_is_refused_by_its_name(folder, given, message):
    write(folder, a_xlsx="", b_csv="", c_tsv="")
    with pytest.raises(ConfigError, match=message):
        find_tables(given, key="data.test")


def test_end_of_a_name_may_be_in_capitals(folder):
    write(folder, A_CSV="text\none\n")
    assert len(read_table(find_tables("A.CSV", key="data.train"), choose=choose)) == 1
