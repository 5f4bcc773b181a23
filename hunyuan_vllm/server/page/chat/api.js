/** Requests to the server that served this page. Addresses are relative, so that it may lie below a prefix. */
import { Problem, problemInStream, problemOf } from "./problem.js";
import { eventsOf } from "./sse.js";

/** The models served: [{id, max_model_len}, …]. */
export async function listModels(key) {
  const response = await request("v1/models", key);
  return (await response.json()).data;
}

/**
 * Ask for an answer and yield its parts: {text, thought, usage, finish}, each there when the server sent it.
 * Throws a Problem; stops with an AbortError when the signal says so, which also ends the work on the server.
 */
export async function* streamAnswer(body, key, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(streamed),
    signal,
  });
  let whole = false;
  for await (const data of whileConnected(eventsOf(response.body))) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw problemInStream(chunk.error);
    const choice = chunk.choices?.[0];
    whole ||= Boolean(choice?.finish_reason);
    const { content, reasoning } = choice?.delta ?? {};
    yield { text: content ?? "", thought: reasoning ?? "", usage: chunk.usage, finish: choice?.finish_reason };
  }
  if (!whole) throw new Problem("cut");
}

async function request(path, key, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem("unreachable");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function* whileConnected(events) {
  try {
    yield* events;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem("cut");
  }
}
