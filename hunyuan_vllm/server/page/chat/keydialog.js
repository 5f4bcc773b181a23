/** The dialog for the API key. */
import { loadKey, saveKey } from "./store.js";
import { say } from "./words.js";

const dialog = document.getElementById("key-dialog");
const form = document.getElementById("key-form");
const input = document.getElementById("key");
const remember = document.getElementById("remember");
const why = document.getElementById("key-why");
let current = loadKey();

export function currentKey() {
  return current;
}

/**
 * Ask for a key until `accepts` takes one or the user gives up; whether one was taken.
 * @param accepts (key) → promise of whether the server takes it; other troubles are thrown
 */
export async function askForKey(accepts) {
  why.textContent = current ? say("wrongKey") : "";
  input.value = "";
  dialog.showModal();
  try {
    for (;;) {
      const key = await enteredKey();
      if (key === null) return false;
      if (await accepts(key)) {
        current = key;
        saveKey(key, remember.checked);
        return true;
      }
      why.textContent = say("wrongKey");
      input.select();
    }
  } finally {
    dialog.close();
  }
}

function enteredKey() {
  return new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      resolve(input.value.trim());
    };
    document.getElementById("key-cancel").onclick = () => resolve(null);
    dialog.oncancel = () => resolve(null); // Esc
  });
}
