"""What is printed is what was said: no markup is read out of it, and a pipe's lines stay whole."""

from __future__ import annotations

import pytest

from edgeflow import terminal

NAME = "[red]model[/] :apple: " + "long " * 60


def parts() -> list[terminal.Part]:
    table = terminal.table(["Model"], ["MiB"], title="sizes of [bold]")
    table.add_row("[red]model :apple:", "1.50")
    return [table, NAME]


def test_texts_are_printed_as_they_are_and_whole() -> None:
    lines = terminal.plain(parts()).splitlines()
    assert lines[0] == "sizes of [bold]" and lines[-1] == NAME.rstrip()
    assert next(line.split() for line in lines if ":apple:" in line) == ["[red]model", ":apple:", "1.50"]
    assert lines == [line.rstrip() for line in lines] and not any("\x1b" in line for line in lines)


def test_a_pipe_gets_the_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(parts())
    assert capsys.readouterr().out == terminal.plain(parts())


def test_json_is_the_reports_own_and_alone(capsys: pytest.CaptureFixture[str]) -> None:
    class Report:
        def to_json(self) -> str:
            return "{}\n"

    terminal.print_report(Report(), parts(), as_json=True)
    assert capsys.readouterr().out == "{}\n"
