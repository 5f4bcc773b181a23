/** A problem as a person reads it: what it means, the server's own words, and a button to try again. */
import { Problem } from "./problem.js";
import { actionButton } from "./turn.js";
import { say } from "./words.js";

const place = document.getElementById("problem");

export function complain(error, tryAgain) {
  if (!(error instanceof Problem)) console.error(error);
  const { kind, detail, retryAfter } = error instanceof Problem ? error : new Problem("server", String(error));
  const meaning = document.createElement("p");
  const words = document.createElement("p");
  const waits = kind === "busy" && retryAfter;
  meaning.textContent = waits ? say("problem_busyFor", { seconds: retryAfter }) : say(`problem_${kind}`);
  words.className = "note";
  words.textContent = detail;
  place.replaceChildren(meaning, words, actionButton("tryAgain", tryAgain));
  place.scrollIntoView({ block: "nearest" });
}

export function stopComplaining() {
  place.replaceChildren();
}
