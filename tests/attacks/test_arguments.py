"""Whoever can list processes: no command takes a secret as an argument.

Covers: every option of ``bunk``, ``bunk-agent`` and ``bunk-control`` as their parsers know them, and join
tokens from standard input. Does not cover: what running processes show (``test_running_stack``).
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import click
import pytest
from running_workers import config_in

from agent import __main__ as agent_main
from agent import calibrate_command, check_box, rotate
from agent import config as agent_config
from bunkhouse.cli.main import bunk as bunk_command
from control import config as control_config
from control import rotate_command, router_command, simulate_command

# Words of things that nobody else may know; an option with one of them takes a file.
SECRET = re.compile(r"key|token(?!s-per)|secret|password|credential|bearer|auth", re.IGNORECASE)
FILES = ("-file", "-to", "--tls-key", "--tls-cert")


def click_options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.is_flag:
            yield from parameter.opts
        elif isinstance(parameter, click.Argument):
            yield f"argument {parameter.name}"
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from click_options(each)


def parser_options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from parser_options(each)
        elif action.nargs != 0:
            yield from action.option_strings


class Seen(Exception):
    """A parser was about to parse."""


def parsers(*mains: object) -> Iterator[argparse.ArgumentParser]:
    """The parsers that these functions build; each stops when it would parse."""
    for main in mains:
        with (
            mock.patch.object(
                argparse.ArgumentParser, "parse_args", autospec=True, side_effect=_raise
            ) as parse,
            pytest.raises(Seen),
        ):
            main([])  # type: ignore[operator]
        yield parse.call_args.args[0]


def _raise(*_: object) -> None:
    raise Seen


def test_no_option_takes_a_secret() -> None:
    options = [*click_options(bunk_command), *parser_options(agent_config.arguments())]
    mains = (calibrate_command.main, check_box.main, rotate.main, control_config.parse_config)
    mains += (rotate_command.main, simulate_command.main, router_command.main)
    for parser in parsers(*mains):
        options += parser_options(parser)
    assert {"--join-token-file", "--key-file", "--data-dir"} <= set(options)
    assert len(options) > 60
    wrong = [option for option in options if SECRET.search(option) and not option.endswith(FILES)]
    # A key is revoked by its public id.
    assert wrong in (["argument key_id"], []), wrong


def test_a_join_token_comes_from_standard_input(tmp_path: Path) -> None:
    """It lies in a file of the agent's own until the node has joined, which nobody else may read."""
    config = replace(config_in(tmp_path), join_token_file=Path("-"))
    with mock.patch("sys.stdin", io.StringIO("pin.id.secret\nmore")):
        taken = agent_main._with_token_of_input(config)
    assert taken.join_token_file == tmp_path / "join.token"
    assert (tmp_path / "join.token").read_text() == "pin.id.secret\n"
    assert (tmp_path / "join.token").stat().st_mode & 0o077 == 0
