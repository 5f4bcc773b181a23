/** The chat page: joins its parts, and decides what a click or key does. */
import { receive } from "./answer.js";
import { complain, stopComplaining } from "./complaint.js";
import { changeKey, ready } from "./connection.js";
import { messagesToSend } from "./conversation.js";
import { downloadConversation } from "./download.js";
import { following, goToEnd } from "./follow.js";
import { currentKey } from "./keydialog.js";
import { Log } from "./log.js";
import { chosenModel, forgetModels, preferModel } from "./models.js";
import { Settings } from "./settings.js";
import { loadRecord, onChangeElsewhere, saveRecord } from "./store.js";
import { number, say } from "./words.js";

const PLACES = ["model", "save", "new", "change-key", "log", "start", "ask", "question", "send", "stop", "used", "kept", "status"];
const place = Object.fromEntries(PLACES.map((id) => [id, document.getElementById(id)]));
const kept = loadRecord();
const settings = new Settings(kept, (otherLanguage) => {
  if (otherLanguage && !running) show();
  keep();
});
const log = new Log(place.log, { again: answerAgain, edit: editQuestion, remove: removeQuestion });
let messages = kept.messages ?? [];
let running = null; // AbortController of the answer that is being written

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
  const saved = saveRecord({ ...settings.record, model: place.model.value || kept.model, messages });
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
  stopComplaining();
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
    explain(error);
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
  if (turn.message.content || turn.message.reasoning || turn.message.finish === "stop") {
    turn.show();
  } else {
    messages.pop();
    turn.element.remove();
    log.show(messages);
  }
}

function requestBody() {
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  return { model: chosenModel().id, messages: [...system, ...messagesToSend(messages)], ...settings.sampling };
}

function explain(error) {
  forgetModels(); // they may be others, or want another key, by the next try
  complain(error, answerAgain);
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
  stopComplaining();
  show();
  keep();
  place.question.focus();
}

function removeQuestion(question) {
  if (running) return;
  messages = messages.filter((message) => message !== question);
  stopComplaining();
  show();
  keep();
  place.question.focus();
}

function startAnew() {
  if (messages.length && !confirm(say("deleteIt"))) return;
  running?.abort();
  messages = [];
  stopComplaining();
  show();
  keep();
  place.question.focus();
}

/** Meet the server as soon as the page is there, so that a missing key or server is known before a question is typed. */
function connect() {
  stopComplaining();
  return ready().then(offer, explain);
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
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !isComposing(event)) running?.abort();
});
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
place.new.addEventListener("click", startAnew);
place.model.addEventListener("change", keep);
place.save.addEventListener("click", () => downloadConversation(messages, settings.system));
place["change-key"].addEventListener("click", () => changeKey().catch(explain));
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
