/** The chat page: joins its parts, and decides what a click or key does. */
import { receive } from "./answer.js";
import { askForKey, currentKey } from "./keydialog.js";
import { downloadConversation } from "./download.js";
import { following, goToEnd } from "./follow.js";
import { Log } from "./log.js";
import { chosenModel, forgetModels, loadModels, preferModel } from "./models.js";
import { Problem } from "./problem.js";
import { Settings } from "./settings.js";
import { loadRecord, onChangeElsewhere, saveRecord } from "./store.js";
import { actionButton } from "./turn.js";
import { number, say } from "./words.js";

const place = Object.fromEntries(["log", "start", "problem", "ask", "question", "send", "stop", "status", "used", "kept", "save", "model"]
  .map((id) => [id, document.getElementById(id)]));
const kept = loadRecord();
const settings = new Settings(kept, (otherLanguage) => {
  if (otherLanguage && !running) show();
  keep();
});
const log = new Log(place.log, { again: answerAgain, edit: editQuestion });
let messages = kept.messages ?? [];
let running = null; // AbortController of the answer that is being written
let connecting = null; // promise of the first contact, while it is being made

function show() {
  log.show(messages);
  offer();
}

/** What can be done now depends on whether an answer is being written. */
function offer() {
  if (!running) log.offer();
  place.start.hidden = messages.length > 0;
  place.save.disabled = messages.length === 0;
  place.send.hidden = running !== null;
  place.stop.hidden = running === null;
  const usage = messages.findLast(({ usage }) => usage)?.usage;
  const all = chosenModel()?.max_model_len;
  const used = usage && { used: number(usage.prompt + usage.completion), all: number(all ?? 0) };
  place.used.textContent = usage && all ? say("used", used) : "";
}

function keep() {
  const saved = saveRecord({ ...settings.record, model: place.model.value, messages });
  place.kept.textContent = saved ? "" : say("notKept");
}

async function sendQuestion() {
  const content = place.question.value.trim();
  if (!content || running || !settings.check()) return;
  messages.push({ role: "user", content });
  log.add(messages.at(-1));
  place.question.value = "";
  goToEnd();
  await answer();
}

async function answer() {
  place.problem.replaceChildren();
  running = new AbortController();
  let turn = null;
  try {
    await ready();
    const body = requestBody();
    const message = { role: "assistant", model: body.model, content: "" };
    messages.push(message);
    turn = log.add(message);
    turn.busy = true;
    offer();
    place.status.textContent = say("answering");
    await receive(message, body, currentKey(), running.signal, () => turn.showSoon());
    place.status.textContent = message.content;
  } catch (error) {
    await explain(error);
  } finally {
    running = null;
    following(() => {
      if (turn) finish(turn);
      offer();
    });
    keep();
  }
}

function finish(turn) {
  turn.busy = false;
  if (turn.message.content || turn.message.finish === "stop") {
    turn.show();
  } else {
    messages.pop();
    turn.element.remove();
    log.show(messages);
  }
}

/** Until the server can be asked: its models are known, with a key if it wants one. */
function ready() {
  connecting ??= meetServer().finally(() => (connecting = null));
  return connecting;
}

async function meetServer() {
  if (chosenModel() || (await accepts(currentKey()))) return;
  if (!(await askForKey(accepts))) throw new Problem("key");
}

async function accepts(key) {
  try {
    await loadModels(key);
    return true;
  } catch (error) {
    if (error.kind === "key") return false;
    throw error;
  }
}

function requestBody() {
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  const said = messages.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
  return { model: chosenModel().id, messages: [...system, ...said], ...settings.sampling };
}

async function explain(error) {
  if (!(error instanceof Problem)) throw error;
  forgetModels(); // they may be others, or want another key, by the next try
  const text = document.createElement("p");
  const detail = document.createElement("p");
  const waits = error.kind === "busy" && error.retryAfter;
  text.textContent = waits ? say("problem_busyFor", { seconds: error.retryAfter }) : say(`problem_${error.kind}`);
  detail.className = "note";
  detail.textContent = error.detail;
  place.problem.replaceChildren(text, detail, actionButton("tryAgain", answerAgain));
  place.problem.scrollIntoView({ block: "nearest" });
}

function withoutLastAnswer() {
  return messages.at(-1)?.role === "assistant" ? messages.slice(0, -1) : messages;
}

async function answerAgain() {
  if (running || !settings.check()) return;
  messages = withoutLastAnswer();
  place.question.focus();
  show();
  if (messages.length) await answer();
  else await connect();
}

function editQuestion() {
  if (running) return;
  const [question, ...rest] = withoutLastAnswer().toReversed();
  messages = rest.toReversed();
  place.question.value = question.content;
  place.problem.replaceChildren();
  show();
  keep();
  place.question.focus();
}

function startAnew() {
  if (messages.length && !confirm(say("deleteIt"))) return;
  running?.abort();
  messages = [];
  place.problem.replaceChildren();
  show();
  keep();
  place.question.focus();
}

/** Meet the server as soon as the page is there, so that a missing key or server is known before a question is typed. */
async function connect() {
  place.problem.replaceChildren();
  try {
    await ready();
    offer();
  } catch (error) {
    await explain(error);
  }
}

/** Whether the key is an input method's, whose Enter picks characters; Safari says so by the code alone. */
function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

place.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  sendQuestion();
});
place.question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
  event.preventDefault();
  sendQuestion();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
place.stop.addEventListener("click", () => {
  running?.abort();
  place.question.focus();
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    place.question.value = example.textContent;
    place.question.focus();
    sendQuestion();
  });
}
document.getElementById("new").addEventListener("click", startAnew);
place.model.addEventListener("change", keep);
place.save.addEventListener("click", () => downloadConversation(messages, settings.system));
document.getElementById("change-key").addEventListener("click", async () => {
  try {
    await askForKey(accepts);
  } catch (error) {
    await explain(error);
  }
});
addEventListener("pagehide", () => running && keep());
onChangeElsewhere(() => {
  if (running) return;
  messages = loadRecord().messages ?? [];
  show();
});
preferModel(kept.model);
show();
place.question.focus();
connect();
