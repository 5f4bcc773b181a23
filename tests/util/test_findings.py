"""What findings add up to, and how thousands of names are shown."""

import io

from rich.console import Console

from hunyuan_vllm.cli.show import show_sections, tally
from hunyuan_vllm.util.findings import Section, exit_status, sections_json
from hunyuan_vllm.util.text import group_similar, some


def section() -> Section:
    found = Section("Title")
    found.ok("one", "fine")
    found.warning("two", "odd", "look at it")
    found.skipped("three", "no tool")
    return found


def test_only_problems_change_the_exit_status() -> None:
    found = section()
    assert exit_status([found]) == 0 and tally([found]) == "1 warning, 1 skipped"
    found.problem("four", "broken", "mend it", ["a", "b"])
    found.problem("five", "broken", "mend it")
    assert exit_status([found]) == 1 and tally([found]) == "2 problems, 1 warning, 1 skipped"
    (json,) = sections_json([found])
    assert json["findings"][3] == {
        "subject": "four", "status": "problem", "text": "broken", "remedy": "mend it", "items": ("a", "b"),
    }  # fmt: skip


def test_names_that_differ_only_in_numbers_share_a_line() -> None:
    names = [f"model.layers.{layer}.q.scale is {layer / 7:.2e}, one of 2 in 1,{layer:03}" for layer in range(64)]
    assert group_similar([*names, "model.norm"]) == ["model.layers.*.q.scale is *, one of * in * (64)", "model.norm"]
    kinds = [f"{letter}.{number}" for letter in "abcdefgh" for number in range(2)]
    assert group_similar(kinds)[-1] == "and 3 more kinds"
    assert group_similar(names[:3]) == names[:3]
    assert some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_lines_wrap_under_their_text_on_a_terminal_and_not_in_a_file() -> None:
    found = Section("Title")
    found.problem("subject", "word " * 40, "remedy " * 20, ["[item] in brackets"])
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None, highlight=False)
        show_sections([found], console)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert (len(lines) == 4) != terminal
        assert "[item] in brackets" in console.file.getvalue()  # type: ignore[attr-defined]
        if terminal:
            assert max(map(len, lines)) <= 80
            assert lines[2].startswith(" " * 11 + "word")
