"""Values that a field of a request should not have, by field where there is something to know about it."""

from random import Random
from typing import Any


class Raw(str):
    """Text that stands in the JSON as it is, such as NaN."""


SURROGATE = "\ud800"
ODD_TEXT = [
    "", " ", "\0", "\x7f\x1b[2J", SURROGATE, f"a{SURROGATE}b", "\udfff\ud800", "﷽" * 50, "Z̵" + "̵" * 300,
    "\u202e\u2066abc",
    "👨‍👩‍👧‍👦" * 20, "<|startoftext|>", "<|eos|><|extra_0|>", "{{ 7*7 }}",
    "{% for i in range(99999999) %}x{% endfor %}",
    "../../etc/passwd", "'; DROP TABLE x;--", "<script>alert(1)</script>", "%s%n%x", "a" * 5000, "\n" * 999, "١٢٣",
    "\ufeff", "\uffff\ufffe", "𝔘" * 99, "null", "NaN", "-1", "0x10", "1e400", "true",
]  # fmt: skip
NUMBERS: list[Any] = [
    -1, 0, 1, 2, -2, -(2**31), 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, -(10**30),
    10**400,
    0.5, -0.0, 1e-320, 1e308, -1e308, Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"),
    Raw("9" * 5000), Raw("0." + "1" * 5000), Raw("1E+2"), "1", "-1", "1e3", "abc", True, False,
]  # fmt: skip
OTHERS: list[Any] = [
    None,
    [],
    {},
    [[]],
    [None],
    [{}],
    {"": ""},
    {"a": {"b": {"c": []}}},
    [1, "a", None, {}],
    {"type": "object"},
]
TOKENS: list[Any] = [
    [-1], [2**31], [2**63], [10**30], [1.5], ["1"], [None], [[1]], [2047], [2048], [1801] * 3, [0] * 3000, [True],
    [], {}, "12",
    list(range(2048)),
]  # fmt: skip
DEEP_SCHEMA: Any = {"type": "string"}
for _ in range(200):
    DEEP_SCHEMA = {"type": "object", "properties": {"a": DEEP_SCHEMA}, "required": ["a"]}
SCHEMAS: list[Any] = [
    {}, True, False, [], "{}", "", "{", {"type": "nothing"}, {"type": ["object", 5]}, {"$ref": "#"},
    {"$ref": "#/nowhere"},
    {"$ref": "http://127.0.0.1:1/schema.json"}, {"$ref": "file:///etc/passwd"}, {"allOf": []}, {"anyOf": [{}] * 300},
    {"enum": []}, {"enum": [f"value{i}" for i in range(3000)]}, {"const": {"a": [None, 1e300]}}, DEEP_SCHEMA,
    {"type": "string", "pattern": "(a+)+$"}, {"type": "string", "pattern": "("}, {"type": "string",
    "pattern": "(?<=x)y\\b"},
    {"type": "string", "minLength": 10**9}, {"type": "string", "minLength": 5, "maxLength": 1},
    {"type": "integer", "minimum": 10, "maximum": 1}, {"type": "number", "multipleOf": 0},
    {"type": "integer", "minimum": -(10**40), "maximum": 10**40}, {"type": "array", "minItems": 10**6},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"not": {}}, {"if": {}, "then": False},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}},
    {"type": "object", "patternProperties": {"[": {}}}, {"type": "object", "required": ["a"],
    "additionalProperties": False},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, {"properties": []},
    {"type": "object", "properties": {SURROGATE: {}}}, {"type": "string", "format": "no-such-format"}, {"type": None},
]  # fmt: skip
REGEXES: list[Any] = [
    "", "(", ")", "[", "[^", "a{", "a{2,1}", "a{1,100000}", "(a{100}){100}", "(a+)+$", "(a|a)*b", "(?=a)b",
    "(?<n>a)\\k<n>",
    "\\1", "\\p{Nonsense}", "\\u{110000}", "\\", "*", "+", "a**", "^$^$", "[z-a]", "[\\d-z]", "(?i)x", "\0",
    SURROGATE, ".*" * 50,
    "(" * 500 + ")" * 500, "[" + "".join(chr(0x4E00 + i) for i in range(500)) + "]", 5, None, [], {}, "\\b", "(?:)",
    "a|",
    "((((((((((a{9}){9}){9}){9}){9}){9}){9}){9}){9}){9})",
]  # fmt: skip
GRAMMARS: list[Any] = [
    "", "root", "root ::=", 'root ::= "a" root', 'root ::= root "a"', "root ::= nowhere", "a ::= b\nb ::= a", "::=",
    5, [],
    'root ::= [', "start: /(/", "start: start", '?start: "a"', "x" * 5000, 'root ::= "\\ud800"',
    'root ::= ("a"){1000000}',
    "root ::= " + "(" * 300 + '"a"' + ")" * 300,
]  # fmt: skip
STRUCTURED: list[Any] = [
    *({"json": schema} for schema in SCHEMAS),
    *({"regex": regex} for regex in REGEXES),
    *({"grammar": grammar} for grammar in GRAMMARS),
    {"choice": []}, {"choice": [""]}, {"choice": "ab"}, {"choice": [1]}, {"choice": [SURROGATE]},
    {"choice": ["a"] * 5000},
    {"choice": ["x" * 5000]}, {"json": {}, "regex": "a"}, {}, {"json_object": False}, {"json_object": "x"},
    {"nothing": 1},
    {"structural_tag": "{"}, {"structural_tag": '{"type":"structural_tag","format":{}}'}, {"structural_tag": "{}"},
    {"structural_tag": '{"structures":[{"begin":"","schema":{},"end":""}],"triggers":[""]}'}, {"structural_tag": 5},
    {"json": {"type": "object"}, "backend": "nothing"}, {"regex": "a", "whitespace_pattern": "("},
    {"json": {"type": "object"}, "disable_any_whitespace": "x"}, {"regex": "a", "_backend": "outlines"},
]  # fmt: skip
FORMATS: list[Any] = [
    *({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}} for schema in SCHEMAS),
    {"type": "json_schema"}, {"type": "json_schema", "json_schema": None}, {"type": "json_schema", "json_schema": {}},
    {"type": "json_schema", "json_schema": {"name": "x"}}, {"type": "json_object"}, {"type": "text"}, {"type": "x"},
    {},
    {"type": "structural_tag"}, {"type": "structural_tag", "format": {}}, "json_object", {"type": ["json_object"]},
    {"type": "structural_tag", "structures": [], "triggers": []}, {"type": "structural_tag",
    "format": {"type": "any_text"}},
    {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"type": "nothing"}}},
]  # fmt: skip
FUNCTIONS: list[Any] = [
    {}, {"type": "function"}, {"type": "function", "function": {}}, {"type": "function", "function": {"name": ""}},
    {"type": "x", "function": {"name": "f"}}, {"type": "function", "function": {"name": "f", "parameters": []}},
    *({"type": "function", "function": {"name": "f", "parameters": schema}} for schema in SCHEMAS),
    {"type": "function", "function": {"name": "x" * 5000, "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": SURROGATE, "parameters": {"type": "object"}}}, None, 5, "f",
]  # fmt: skip
CHOICES: list[Any] = [
    "none", "auto", "required", "any", "", {}, {"type": "function"}, {"type": "function", "function": {"name": "f"}},
    {"type": "function", "function": {"name": "nowhere"}}, {"type": "function", "function": {}}, {"type": "x"}, 5, [],
    {"type": "allowed_tools"}, {"type": "function", "function": {"name": SURROGATE}},
]  # fmt: skip
PARTS: list[Any] = [
    {"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": 5}, {"type": "x"}, {}, None, 5, "a",
    [],
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}, {"type": "image_url"},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, {"type": "image_url", "image_url": "data:,x"},
    {"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}, {"type": "video_url", "video_url": {}},
    {"type": "image_embeds", "image_embeds": "gAN9cQAu"}, {"type": "refusal", "refusal": "no"}, {"type": "thinking"},
    {"type": "text", "text": SURROGATE}, {"type": "file", "file": {"file_id": "x"}}, {"type": "image_pil",
    "image_pil": None},
    {"image_url": "http://127.0.0.1:1/"}, {"type": "tool_reference", "name": "x"}, {"type": "text", "text": "a",
    "uuid": 5},
]  # fmt: skip
MESSAGES: list[Any] = [
    [], {}, "hello", None, [None], [5], [[]], [{}], [{"role": "user"}], [{"content": "a"}], [{"role": None,
    "content": "a"}],
    *([{"role": role, "content": "a"}] for role in ("tool", "developer", "function", "root", "", 5, "user\0",
    SURROGATE)),
    *([{"role": "user", "content": [part]}] for part in PARTS),
    *([{"role": "user", "content": text}] for text in ODD_TEXT),
    [{"role": "assistant", "content": None}], [{"role": "assistant", "tool_calls": 5}], [{"role": "user",
    "content": {}}],
    [{"role": "assistant", "tool_calls": [{}]}], [{"role": "assistant",
    "tool_calls": [{"function": {"arguments": "{"}}]}],
    [{"role": "assistant", "tool_calls": [{"type": "function", "id": "x", "function": {"name": "f",
    "arguments": "["}}]}],
    [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": 5}}]}],
    [{"role": "tool", "tool_call_id": [], "content": "a"}], [{"role": "user", "content": "a"}] * 300,
    [{"role": "system", "content": "a"}] * 3, [{"role": "assistant", "content": "a"}] * 2, [{"role": "user",
    "content": []}],
    [{"role": "assistant", "content": "a", "function_call": {}}], [{"role": "user", "content": "a", "name": {}}],
    [{"role": "assistant", "reasoning": {}, "content": "a"}], [{"role": "system", "content": []}], [{"role": "tool"}],
]  # fmt: skip
PROMPTS: list[Any] = [
    *ODD_TEXT,
    *TOKENS,
    *OTHERS,
    5,
    [""],
    ["a", 5],
    [[1], "a"],
    [[]],
    ["a"] * 300,
    [[1], [2**40]],
    [[1], []],
    "x " * 3000,
]
BIASES: list[Any] = [
    {"1": 101}, {"1": Raw("NaN")}, {"1": Raw("Infinity")}, {"x": 1}, {"-1": 1}, {"2048": 1}, {"99999999": 5},
    {"1": "a"},
    {"1": None}, {"1.5": 1}, {str(2**63): 1}, {str(10**30): 1}, {"": 1}, {str(i): -100 for i in range(2048)},
    {"1": -1e308},
    [1], [[1, 2]], "1:1", {"１": 1}, {" 1 ": 1}, {"1_0": 1},
]  # fmt: skip
STOPS: list[Any] = [
    "", [""], ["a", ""], [5], [None], [[]], "a" * 9999, ["a"] * 5000, [SURROGATE], ["\0"], {}, 5, [[]] * 9,
    list("abcdefghij"),
]  # fmt: skip
STREAMS: list[Any] = [{"include_usage": "x"}, {"continuous_usage_stats": 5}, {}, {"include_usage": True}, [], 5, "x"]
TEMPLATES: list[Any] = [
    "{{ 1/0 }}",
    "{% raw %}",
    "{{ ''.__class__.__mro__ }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "x",
    "",
]
ARGUMENTS: list[Any] = [
    {"messages": 5}, {"tools": 5}, {"add_generation_prompt": 5}, {"tokenize": True}, {"chat_template": "x"}, {"": 1},
    {"self": 1},
    {"conversation": []}, {"return_tensors": "pt"}, {"continue_final_message": True}, {"bos_token": 5},
    {"tokenizer": None},
    {"return_dict": True}, {"max_length": -1}, {"truncation": "x"}, {"padding": 10**9},
]  # fmt: skip
DETECTIONS: list[Any] = [
    {"max_pattern_size": -1}, {"max_pattern_size": 10**9, "min_count": 2}, {"min_count": 0}, {"min_count": 1},
    {"x": 1},
    {"max_pattern_size": 1, "min_pattern_size": 5, "min_count": 2}, {"max_pattern_size": "a"},
]  # fmt: skip
EXTRAS: list[Any] = [
    {"a": [1, "b"]},
    {"a": {}},
    {"a": None},
    {"": 1},
    {"a": 10**400},
    {"a": SURROGATE},
    {"do_remote_prefill": True},
]

# Fields that all generating APIs have, and what is put into them beside the values for any field.
COMMON: dict[str, list[Any]] = {
    "model": [*ODD_TEXT, "gpt-4", "hunyuan/../x"], "n": NUMBERS, "max_tokens": NUMBERS, "min_tokens": NUMBERS,
    "seed": NUMBERS,
    "temperature": NUMBERS, "top_p": NUMBERS, "top_k": NUMBERS, "min_p": NUMBERS, "frequency_penalty": NUMBERS,
    "presence_penalty": NUMBERS, "repetition_penalty": NUMBERS, "length_penalty": NUMBERS, "priority": NUMBERS,
    "prompt_logprobs": NUMBERS, "truncate_prompt_tokens": NUMBERS, "truncation_side": ["x", "left", "right"],
    "stream_interval": NUMBERS, "thinking_token_budget": NUMBERS, "routed_experts_prompt_start": NUMBERS,
    "stop": STOPS,
    "stop_token_ids": TOKENS, "allowed_token_ids": TOKENS, "logprob_token_ids": TOKENS, "bad_words": STOPS,
    "logit_bias": BIASES,
    "stream": ["x", 2, "true"], "stream_options": STREAMS, "structured_outputs": STRUCTURED,
    "response_format": FORMATS,
    "request_id": [*ODD_TEXT, "same"], "cache_salt": ODD_TEXT, "session_id": ODD_TEXT, "user": ODD_TEXT,
    "use_beam_search": [True, "x"],
    "repetition_detection": DETECTIONS, "kv_transfer_params": EXTRAS, "ec_transfer_params": EXTRAS,
    "vllm_xargs": EXTRAS,
    "mm_payload": ODD_TEXT, "watermarking": [True], "return_token_ids": [True], "return_tokens_as_token_ids": [True],
    "return_token_offsets": [True], "return_prompt_text": [True], "return_mm_kwargs": [True], "ignore_eos": [True,
    "x"], "skip_special_tokens": ["x"],
    "echo": [True, "x"], "add_special_tokens": ["x"], "include_stop_str_in_output": [True],
}  # fmt: skip
CHAT = COMMON | {
    "messages": MESSAGES, "tools": [[one] for one in FUNCTIONS] + [FUNCTIONS[12:] * 9], "tool_choice": CHOICES,
    "logprobs": [True, 5],
    "top_logprobs": NUMBERS, "max_completion_tokens": NUMBERS, "chat_template": TEMPLATES,
    "chat_template_kwargs": ARGUMENTS,
    "continue_final_message": [True], "add_generation_prompt": [True, False], "documents": [[], [5], [{}],
    [{"a": SURROGATE}]],
    "reasoning_effort": ["x", "none", "high"], "parallel_tool_calls": ["x", False], "media_io_kwargs": EXTRAS,
    "mm_processor_kwargs": EXTRAS,
    "include_reasoning": [False, "x"],
}  # fmt: skip
COMPLETIONS = COMMON | {
    "prompt": PROMPTS,
    "logprobs": NUMBERS,
    "suffix": ODD_TEXT,
    "prompt_embeds": ["gAN9cQAu", "", ["a"], "%%"],
}
INPUTS = ["input_text", "input_image", "input_file", "input_audio", "output_text", "refusal", "x", None]
ANSWERS = [
    [],
    [{"type": "refusal", "refusal": "a"}],
    [{"type": "output_text", "text": "a", "annotations": []}] * 2,
    [{}],
]
RESPONSES = {
    "input": [*PROMPTS, *MESSAGES, [{"type": "function_call_output"}], [{"type": "reasoning"}],
    *([{"type": "function_call_output", "output": [{"type": kind, "text": "a"}], **more}]
      for kind in INPUTS for more in ({"call_id": "x"}, {"id": "x", "status": "completed"})),
    *([{"role": "user", "content": [{"type": kind}]}] for kind in INPUTS),
    *([{"type": "message", "role": "assistant", "id": "", "status": status, "content": content}]
      for status in ("in_progress", "completed", "x") for content in ANSWERS)],
    "instructions": [*ODD_TEXT, 5],
    "max_output_tokens": NUMBERS, "temperature": NUMBERS, "top_p": NUMBERS, "top_logprobs": NUMBERS,
    "max_tool_calls": NUMBERS,
    "previous_response_id": [*ODD_TEXT, "resp_nothing"], "store": [True, "x"], "background": [True, "x"],
    "stream": ["x"], "truncation": ["x", "auto"],
    "tools": [[one] for one in FUNCTIONS] + [[{"type": "web_search"}], [{"type": "mcp",
    "server_url": "http://127.0.0.1:1"}]],
    "tool_choice": CHOICES, "text": [{"format": one} for one in FORMATS], "reasoning": [{"effort": "x"}, {}, 5],
    "metadata": EXTRAS,
    "include": [["x"], 5, ["message.output_text.logprobs"]], "service_tier": ["x"], "prompt": [{"id": "x"}, 5],
    "structured_outputs": STRUCTURED,
    "request_id": ODD_TEXT, "priority": NUMBERS, "cache_salt": ODD_TEXT, "seed": NUMBERS, "stop": STOPS,
    "previous_input_messages": MESSAGES,
    "top_k": NUMBERS, "repetition_penalty": NUMBERS, "logit_bias": BIASES, "ignore_eos": [True],
    "vllm_xargs": EXTRAS, "mm_processor_kwargs": EXTRAS,
}  # fmt: skip
TOKENIZE = {
    "prompt": PROMPTS, "messages": MESSAGES, "add_special_tokens": ["x", False], "return_token_strs": [True, "x"],
    "tools": [[one] for one in FUNCTIONS],
    "chat_template": TEMPLATES, "chat_template_kwargs": ARGUMENTS, "add_generation_prompt": [True, False],
    "continue_final_message": [True, "x"],
    "model": ODD_TEXT, "mm_processor_kwargs": EXTRAS, "media_io_kwargs": EXTRAS,
}  # fmt: skip
FIELDS: dict[str, dict[str, list[Any]]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
    "/tokenize": TOKENIZE,
    "/detokenize": {"tokens": [*TOKENS, *OTHERS, 5], "model": ODD_TEXT},
}
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 4},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 4},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [1, 2, 3]},
}


def hostile_value(random: Random, known: list[Any]) -> Any:
    """One of those for the field, or of those for any."""
    pool = random.choices([known, NUMBERS, OTHERS, ODD_TEXT], [6, 1, 1, 1])[0]
    return random.choice(pool)
