/** One message on the page: who says it, what, and under an answer what it cost. */
import { showMarkdown } from "./blocks.js";
import { copyButton } from "./copy.js";
import { following } from "./follow.js";
import { number, say } from "./words.js";

const NOTED = new Set(["length", "stopped", "cut"]); // ends of an answer that a reader should know of

export class Turn {
  #thought = document.createElement("details");
  #text = document.createElement("div");
  #cost = document.createElement("p");
  #note = document.createElement("p");
  #buttons = document.createElement("p");
  #frame = 0;
  #busy = false;
  #thinking = false;
  #unanswered = false;

  constructor(message) {
    this.message = message;
    this.element = document.createElement("article");
    this.element.className = message.role;
    const heading = document.createElement("h2");
    heading.textContent = message.role === "user" ? say("you") : message.model;
    if (message.role === "user") heading.dataset.text = "you";
    const summary = document.createElement("summary");
    summary.dataset.text = "thinking";
    summary.textContent = say("thinking");
    this.#thought.className = "thought";
    this.#thought.append(summary, document.createElement("div"));
    this.#thought.lastChild.dir = "auto";
    this.#text.className = "text";
    this.#text.dir = "auto";
    this.#cost.className = "cost";
    this.#note.className = "note";
    this.#buttons.className = "buttons";
    this.element.append(heading, this.#thought, this.#text, this.#note, this.#cost, this.#buttons);
    this.show();
  }

  /** Bring what is shown up to the message. */
  show() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const { role, content, reasoning, finish } = this.message;
    const noted = NOTED.has(finish) && !this.#busy ? finish : this.#unanswered && "unanswered";
    this.#showThought(reasoning ?? "", this.#busy && !content);
    if (role === "user") this.#text.textContent = content;
    else showMarkdown(this.#text, content);
    this.#cost.textContent = costOf(this.message);
    this.#note.textContent = noted ? say(noted) : "";
  }

  /** What the model thought, open while there is nothing else. */
  #showThought(reasoning, thinking) {
    this.#thought.hidden = !reasoning;
    this.#thought.lastChild.textContent = reasoning;
    if (thinking !== this.#thinking) this.#thought.open = this.#thinking = thinking;
  }

  /** The same, at most once a picture of the screen. */
  showSoon() {
    this.#frame ||= requestAnimationFrame(() => following(() => this.show()));
  }

  /** Says to screen readers whether more is to come. */
  set busy(busy) {
    this.#busy = busy;
    this.element.ariaBusy = String(busy);
  }

  /** Whether this is a question without an answer, which is not sent again. */
  get unanswered() {
    return this.#unanswered;
  }

  set unanswered(unanswered) {
    this.#unanswered = unanswered;
    this.show();
  }

  /** Replace the buttons: Copy, and those of `actions` ({word: what to do}). */
  offer(actions) {
    const buttons = Object.entries(actions).map(([word, action]) => actionButton(word, action));
    this.#buttons.replaceChildren(copyButton("copy", () => this.message.content), ...buttons);
  }
}

export function actionButton(word, action) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.text = word;
  button.textContent = say(word);
  button.addEventListener("click", action);
  return button;
}

function costOf({ usage, rate, wait }) {
  if (!usage) return "";
  const parts = [say("tokens", { prompt: number(usage.prompt), completion: number(usage.completion) })];
  if (rate) parts.push(say("rate", { rate: number(rate, 1) }));
  if (wait) parts.push(say("wait", { wait: number(wait, 2) }));
  return parts.join(" · ");
}
