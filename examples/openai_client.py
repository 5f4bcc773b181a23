"""Ask the running server with OpenAI's SDK: an answer, a streamed answer, and the probability of each token.

sh deploy/run_server.sh     # in another terminal
pip install openai
python examples/openai_client.py ["a question"]
"""

import math
import os
import sys

from openai import APIConnectionError, OpenAI

question = sys.argv[1] if len(sys.argv) > 1 else "Why is sea water salty?"
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", f"http://127.0.0.1:{os.environ.get('PORT', '8020')}/v1"),
    api_key=os.environ.get("VLLM_API_KEY", "none"),  # needed only if other machines can reach the server
)
try:
    model = client.models.list().data[0].id
except APIConnectionError:
    sys.exit(f"no server answers at {client.base_url}: start one with sh deploy/run_server.sh")
messages = [{"role": "user", "content": question}]

# Temperature, top_p and the like come from the checkpoint's generation_config.json unless given.
answer = client.chat.completions.create(model=model, messages=messages, max_tokens=128)
print(answer.choices[0].message.content)
print(f"[{answer.usage.prompt_tokens} tokens in, {answer.usage.completion_tokens} out]\n")

for chunk in client.chat.completions.create(model=model, messages=messages, max_tokens=128, seed=1, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print("\n")

answer = client.chat.completions.create(
    model=model, messages=messages, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
)
for token in answer.choices[0].logprobs.content:
    others = "  ".join(f"{other.token!r} {math.exp(other.logprob):.0%}" for other in token.top_logprobs)
    print(f"{token.token!r:>14}   {others}")
