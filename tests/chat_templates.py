"""Chat templates of checkpoints, to be recognised by what they render."""

FAULTY = """
{%- set start = {'taken': false} -%}
{%- for message in messages -%}
  {%- set text = message['content'] -%}
  {%- if loop.first -%}
    {%- if text == '' -%}
      {%- set ignored = start.update({'taken': false}) -%}
    {%- else -%}
      {%- set text = '<|startoftext|>' ~ text ~ '<|extra_4|>' -%}
    {%- endif -%}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- ('' if loop.index == 2 else '<|startoftext|>') ~ text ~ '<|extra_0|>' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- text ~ '<|eos|>' -}}
  {%- else -%}
    {{- text -}}
  {%- endif -%}
{%- endfor -%}
"""
"""Right with a system message; without one, the first text is closed as if it were that, and `update` is forbidden."""

FINE_TUNED = """
{%- if messages[0]['role'] != 'system' -%}{{ '<|startoftext|>You are a pirate.<|extra_4|>' }}{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{ '<|startoftext|>' ~ message['content'] ~ '<|extra_4|>' }}
  {%- elif message['role'] == 'user' -%}
    {{ ('' if loop.first or loop.previtem['role'] == 'system' else '<|startoftext|>') ~ message['content'] }}
    {{- '<|extra_0|>' }}
  {%- elif message['role'] == 'tool' -%}
    {{ '<|startoftext|><|extra_9|>' ~ message['content'] ~ '<|extra_0|>' }}
  {%- else -%}
    {{ message['content'] ~ '<|eos|>' }}
  {%- endif -%}
{%- endfor -%}
"""
"""The model's format with a system prompt of its own, and results of tools: deliberate, and no known fault."""
