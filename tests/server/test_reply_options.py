"""The parsers of thinking and tool calls that a launch chooses, and the chat template with tools"""

from dataclasses import replace

import pytest
from launches import CPU, DEMO, GPU8, HUB, launch, parsed
from v1_templates import A13B, DENSE, TRANSLATION

from hunyuan_vllm.chat_template import WITH_TOOLS
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.server.launch import decide
from hunyuan_vllm.server.options import Flags


def test_tools_choose_a_template_and_the_parser_of_its_markup():
    made = parsed(decide(Settings.read({}), Flags([]), CPU, DEMO, {}, tools=True))
    assert made.chat_template == str(WITH_TOOLS) and WITH_TOOLS.is_file()
    assert made.tool_call_parser == "hunyuan_large" and made.enable_auto_tool_choice
    assert parsed(decide(Settings.read({}), Flags([]), CPU, DEMO, {})).chat_template is None
    theirs = Flags(["--chat-template", "mine.jinja", "--tool-call-parser", "hermes"])
    made = parsed(decide(Settings.read({}), theirs, CPU, DEMO, {}, tools=True))
    assert (made.chat_template, made.tool_call_parser) == ("mine.jinja", "hermes")


@pytest.mark.parametrize(
    ("template", "reasoning", "tools"),
    [
        (A13B, "hunyuan_v1", "hunyuan_v1"),
        (DENSE, "hunyuan_v1", "hunyuan_large"),
        (TRANSLATION, "", "hunyuan_large"),
        (None, "", "hunyuan_large"),
    ],
)
def test_parsers_fit_the_chat_template(template, reasoning, tools, tmp_path):
    def parsers(made):
        return made.reasoning_parser, made.tool_call_parser

    model = replace(DEMO, chat_template=template)
    made = parsed(launch(CPU, model))
    assert parsers(made) == (reasoning, tools) and made.enable_auto_tool_choice and made.chat_template is None
    assert parsers(parsed(launch(CPU, model, "--reasoning-parser", "x", "--tool-call-parser", "y"))) == ("x", "y")
    given = tmp_path / "template.jinja"
    given.write_text(template or "")
    for chosen in (str(given), template or "{{ messages }}"):
        assert parsers(parsed(launch(CPU, DEMO, "--chat-template", chosen))) == (reasoning, tools)
    with_tools = parsed(decide(Settings.read({}), Flags([]), CPU, model, {}, tools=True))
    assert with_tools.chat_template == (None if tools == "hunyuan_v1" else str(WITH_TOOLS))


def test_a_model_on_the_hub_has_parsers_of_the_users():
    assert any("--reasoning-parser hunyuan_v1" in note for note in launch(GPU8, HUB).notes)
    for chosen in (["--tool-call-parser", "hermes"], ["--chat-template", "mine.jinja"]):
        assert not any("--reasoning-parser" in note for note in launch(GPU8, HUB, *chosen).notes)
