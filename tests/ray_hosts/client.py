"""Runs on the clients' host: what to ask comes as JSON on standard input, answers go as JSON to standard output.

post: one request. stream: as many clients at once as there are bodies, after whose first words "flowing" is printed.
"""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

TIMEOUT = 120.0  # seconds without a word; longer than any answer may take
FIRST_WORDS = 3


def stream(client: httpx.Client, body: dict[str, Any], flowing: threading.Semaphore) -> dict[str, Any]:
    text, whole, error, words = "", False, "", 0
    try:
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            if response.status_code != httpx.codes.OK:
                error = f"{response.status_code} {response.read().decode(errors='replace')[:300]}"
            for line in response.iter_lines() if not error else ():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    whole = not error
                elif data.startswith("{"):
                    part = json.loads(data)
                    if "error" in part:
                        error = str(part["error"])[:300]
                        continue
                    text += part["choices"][0]["text"]
                    words += 1
                    if words == FIRST_WORDS:
                        flowing.release()
            if not whole and not error:
                error = "the stream ended early"
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}"
    if words < FIRST_WORDS:
        flowing.release()
    return {"text": text, "whole": whole, "error": error, "ended": time.monotonic()}


def main(command: str) -> None:
    asked = json.load(sys.stdin)
    headers = {"Authorization": f"Bearer {asked['key']}"}
    with httpx.Client(base_url=asked["url"], headers=headers, timeout=TIMEOUT, trust_env=False) as client:
        if command == "post":
            response = client.post(asked["path"], json=asked["body"])
            print(json.dumps({"status": response.status_code, "body": response.json()}))
            return
        flowing = threading.Semaphore(0)
        bodies = asked["bodies"]
        with ThreadPoolExecutor(len(bodies)) as pool:
            clients = [pool.submit(stream, client, body, flowing) for body in bodies]
            for _ in bodies:
                flowing.acquire()
            print("flowing", flush=True)
            print(json.dumps([client.result() for client in clients]), flush=True)


main(sys.argv[1])
