"""What is printed holds no control character but the console's own, whatever names say."""

import io

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

import lorasweep.cli
from lorasweep.console import EscapingConsole, say, say_error

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066\u2028[red]\r\b<b>\ud800\0"
ESCAPES = ("\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\u2028", "\r", "\b", "\ud800", "\0")


def shown(renderable):
    file = io.StringIO()
    EscapingConsole(file=file, width=300, force_terminal=False).print(renderable)
    return file.getvalue()


def table():
    made = Table(title=Text(HOSTILE))
    made.add_column(Text(HOSTILE))
    made.add_row(Text(HOSTILE, style="bold"))
    return made


@pytest.mark.parametrize("make", [lambda: Text(HOSTILE), table, lambda: Group(table(), Text(HOSTILE))])
def test_names_give_a_terminal_no_orders(make):
    text = shown(make())
    assert not [c for c in ESCAPES if c in text]
    assert r"\x1b]0;owned" in text
    assert "[red]" in text


def test_styles_of_our_own_still_work():
    file = io.StringIO()
    EscapingConsole(file=file, force_terminal=True, color_system="truecolor").print(Text("arm\x1b[2J", style="bold"))
    assert file.getvalue() == "\x1b[1marm\\x1b[2J\x1b[0m\n"


def test_a_sentence_is_one_line_of_a_length_that_can_be_read(capsys, tmp_path):
    say_error(f"a\nb{HOSTILE}" + "x" * 10**6)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert len(printed) < 5000
    assert not [c for c in ESCAPES if c in printed]
    say("two\nlines\x1b")
    assert capsys.readouterr().out == "two\nlines\\x1b\n"
    name = tmp_path / "\x1b]0;owned\x07\n\u202e[red]"
    assert lorasweep.cli.run(["compare", str(name)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert not [c for c in ESCAPES if c in printed]
