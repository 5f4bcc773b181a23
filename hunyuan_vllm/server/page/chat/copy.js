/** A button that copies a text and says whether it did. */
import { say } from "./words.js";

export function copyButton(name, text) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.text = name;
  button.textContent = say(name);
  button.addEventListener("click", async () => {
    const copied = await copy(text());
    button.textContent = say(copied ? "copied" : "notCopied");
    setTimeout(() => (button.textContent = say(name)), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyTheOldWay(text); // plain HTTP from another machine has no navigator.clipboard
  }
}

function copyTheOldWay(text) {
  const area = document.createElement("textarea");
  const focused = document.activeElement;
  area.value = text;
  area.className = "unseen";
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}
