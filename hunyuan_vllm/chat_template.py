"""The chat template for checkpoints that bring none.

<|startoftext|>system<|extra_4|>user<|extra_0|>assistant<|eos|><|startoftext|>user<|extra_0|>assistant<|eos|> …
"""

__all__ = ["CHAT_TEMPLATE"]

CHAT_TEMPLATE = r"""
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{ content }}
  {%- elif content -%}
    {%- if content | rejectattr('type', 'equalto', 'text') | list -%}
      {{ raise_exception('This model reads text only: a content part has another type than "text".') }}
    {%- endif -%}
    {{ content | map(attribute='text') | select | join('\n') }}
  {%- endif -%}
{%- endmacro -%}
{%- set turn = namespace(open=false) -%}
{%- for message in messages -%}
  {%- set content = text_of(message['content']) -%}
  {%- if message['role'] == 'system' -%}
    {%- if not loop.first -%}
      {{ raise_exception('A system message must be the first message, and the only one.') }}
    {%- endif -%}
    {%- if content -%}
      {{ '<|startoftext|>' + content + '<|extra_4|>' }}
      {%- set turn.open = true -%}
    {%- endif -%}
  {%- elif message['role'] == 'user' -%}
    {{ ('' if turn.open else '<|startoftext|>') + content + '<|extra_0|>' }}
    {%- set turn.open = false -%}
  {%- elif message['role'] == 'assistant' -%}
    {{ content + '<|eos|>' }}
    {%- set turn.open = false -%}
  {%- else -%}
    {#- Not quoted: vLLM logs this, and what clients send is not for logs. -#}
    {{ raise_exception('Unknown role in message ' ~ loop.index ~ '; use system, user or assistant.') }}
  {%- endif -%}
{%- endfor -%}
""".lstrip()
