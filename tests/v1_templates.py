"""Chat templates in the formats of the Hunyuan V1 models, written after their description, and a small vocabulary."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

A13B = """
{%- macro think(text) -%}
  {{ text.split('</think>')[-1].split('<answer>')[-1].split('</answer>')[0].strip() }}
{%- endmacro -%}
{%- if tools -%}
  {%- set weekday = ['一', '二', '三', '四', '五', '六', '日'][strftime_now('%u') | int - 1] -%}
  {{ '<|startoftext|>你是一位函数组合专家。回答以 助手： 开头。\n' ~ tools | tojson }}
  {%- if messages[0]['role'] == 'system' -%}{{ '\n额外要求：' ~ messages[0]['content'] }}{%- endif -%}
  {{ '\n当前时间：' ~ strftime_now('%Y-%m-%d %H:%M:%S') ~ ' 星期' ~ weekday ~ '<|extra_4|>' }}
  {%- for message in messages if message['role'] != 'system' -%}
    {%- if message['role'] == 'user' -%}
      {{ '用户：' ~ message['content'] ~ '<|extra_0|>' }}
    {%- elif message['role'] == 'tool' -%}
      {{ '<tool_response>' ~ message['content'] ~ '</tool_response><|extra_0|>' }}
    {%- elif message['tool_calls'] -%}
      {{ (message['content'] or '') ~ '<tool_calls>[' }}
      {%- for call in message['tool_calls'] -%}
        {{ '{"name": "' ~ call['function']['name'] ~ '", "arguments": ' }}
        {{- (call['function']['arguments'] | tojson) ~ '}' }}
        {{- '' if loop.last else ', ' }}
      {%- endfor -%}
      {{ ']</tool_calls><|eos|>' }}
    {%- else -%}
      {{ '助手：' ~ think(message['content']) ~ '<|eos|>' }}
    {%- endif -%}
  {%- endfor -%}
{%- else -%}
  {%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
      {{ '<|startoftext|>' ~ message['content'] ~ '<|extra_4|>' }}
    {%- elif message['role'] == 'user' -%}
      {{ '' if loop.index0 == 1 and messages[0]['role'] == 'system' else '<|startoftext|>' }}
      {{- message['content'] ~ '<|extra_0|>' }}
    {%- elif message['role'] == 'assistant' -%}
      {{ think(message['content']) ~ '<|eos|>' }}
    {%- endif -%}
  {%- endfor -%}
{%- endif -%}
{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n' }}{%- endif -%}
"""

DENSE = """
{{- '<｜hy_begin▁of▁sentence｜>' -}}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{ message['content'] ~ '<｜hy_place▁holder▁no▁3｜>' }}
  {%- elif message['role'] == 'user' -%}
    {{ '<｜hy_User｜>' ~ message['content'] }}
  {%- else -%}
    {{ '<｜hy_Assistant｜>' ~ message['content'] ~ '<｜hy_place▁holder▁no▁2｜>' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<｜hy_Assistant｜>' }}
  {%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n' }}{%- endif -%}
{%- endif -%}
"""

TRANSLATION = """
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{ '<|startoftext|>' ~ message['content'] ~ '<|extra_0|>' }}
  {%- else -%}
    {{ message['content'] ~ '<|eos|>' }}
  {%- endif -%}
{%- endfor -%}
"""


def small_vocabulary(texts: Sequence[str], chat_template: str = DENSE) -> PreTrainedTokenizerFast:
    """In the form of the smaller dense models' tokenizer.json."""
    pipeline = Tokenizer(BPE())
    pipeline.pre_tokenizer, pipeline.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    pipeline.train_from_iterator(texts, trainer)
    marks = ["begin▁of▁sentence", "place▁holder▁no▁3", "place▁holder▁no▁2", "User", "Assistant"]
    pipeline.add_special_tokens([AddedToken(f"<｜hy_{mark}｜>", special=True) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=pipeline, chat_template=chat_template)
