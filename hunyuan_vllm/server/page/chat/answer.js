/** One answer from the server, written into a message as it comes. */
import { streamAnswer } from "./api.js";
import { Meter } from "./meter.js";

/**
 * Fill `message` (content, reasoning, usage, rate, wait, finish), calling `changed` after each part.
 * A Problem is thrown on after what came has been noted; a stop by `signal` is an end like any other.
 */
export async function receive(message, body, key, signal, changed) {
  const meter = new Meter();
  message.finish = "cut"; // until it is known to have ended otherwise
  try {
    for await (const part of streamAnswer(body, key, signal)) {
      message.content += part.text;
      if (part.thought) message.reasoning = (message.reasoning ?? "") + part.thought;
      if (part.finish) message.finish = part.finish;
      if (part.usage) note(message, part.usage, meter);
      changed();
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    message.finish = "stopped";
  }
}

function note(message, usage, meter) {
  message.usage = { prompt: usage.prompt_tokens, completion: usage.completion_tokens };
  if (usage.completion_tokens > 0) meter.note(usage.completion_tokens);
  message.wait = meter.wait;
  message.rate = meter.rate;
}
